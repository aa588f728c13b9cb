"""An operator that replaces rows of a lookup table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator


class SelectedRows(Operator):
    """A matrix that is zero but for k columns (`axis="in"`) or k rows (`axis="out"`).

    Args:
        index: (k,) int64, no repeats.
        rows: (k, n): the columns, or rows, that are not zero.
        count: length of the indexed axis.
    """

    def __init__(self, index: Tensor, rows: Tensor, count: int, axis: str) -> None:
        self.index, self.rows, self.count, self.axis = index, rows, count, axis

    def apply(self, x: Tensor) -> Tensor:
        rows = self.rows.to(x.dtype)
        if self.axis == "in":
            return x.index_select(-1, self.index) @ rows
        out = x.new_zeros(*x.shape[:-1], self.count)
        return out.index_copy(-1, self.index, F.linear(x, rows))

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids (...) int -> the columns of `axis="in"` they name, (..., n)."""
        k = self.rows.shape[0]
        place = torch.full((self.count,), k, dtype=torch.long, device=self.index.device)
        place = place.index_copy(0, self.index, torch.arange(k, device=self.index.device))
        padded = torch.cat([self.rows, self.rows.new_zeros(1, self.rows.shape[1])])  # (k + 1, n)
        return F.embedding(place[ids], padded)

    def dense(self) -> Tensor:
        full = self.rows.new_zeros(self.count, self.rows.shape[1]).index_copy(0, self.index, self.rows)
        return full.T if self.axis == "in" else full

    @property
    def size(self) -> int:
        return self.count if self.axis == "in" else self.rows.shape[1]
