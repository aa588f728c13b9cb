"""Sums of operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .low_rank import Factored
from .operator import Operator


class Sum(Operator):
    """M_1 + M_2 + ..., for operators of one shape."""

    def __init__(self, *terms: Operator) -> None:
        self.terms = terms

    def sample(self) -> Operator:
        return Sum(*(t.sample() for t in self.terms))

    def apply(self, x: Tensor) -> Tensor:
        y = self.terms[0].apply(x)
        for term in self.terms[1:]:
            y = y + term.apply(x)
        return y

    def dense(self) -> Tensor:
        total = self.terms[0].dense()
        for term in self.terms[1:]:
            total = total + term.dense()
        return total

    def joined(self) -> Operator:
        """One operator with the factors of all terms side by side, or None if a term has none."""
        terms = [t for t in self.terms if isinstance(t, Factored) and t.groups == 1 and t.B.ndim == 2]
        if len(terms) < len(self.terms):
            return self
        return Factored(torch.cat([t.folded_B() for t in terms], 1), torch.cat([t.A for t in terms]))

    def row_squares(self, dtype: torch.dtype) -> Tensor:
        joined = self.joined()
        return super().row_squares(dtype) if joined is self else joined.row_squares(dtype)

    def row_products(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.stack([t.row_products(weight, dtype) for t in self.terms]).sum(0)

    def row_growth(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        joined = self.joined()
        return super().row_growth(weight, dtype) if joined is self else joined.row_growth(weight, dtype)

    @property
    def size(self) -> int:
        return self.terms[0].size


def terms_of(op: Operator | None) -> Sequence[Operator]:
    """What is added up in an operator: itself, or the terms of a sum; nothing for None."""
    if op is None:
        return ()
    return [t for term in op.terms for t in terms_of(term)] if isinstance(op, Sum) else (op,)
