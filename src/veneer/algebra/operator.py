"""The contract of an operator: a linear map that a method returns and a layer kind knows how to apply.

An operator is a matrix M (out, in) that is rarely formed. `apply(x)` computes x M^T over the last axis of
x (..., in) and is the reference of every faster path; `dense()` is M itself. Operators are built on each
call from the trained tensors, so they hold references only. Small matrices are cast to the dtype of the
activations; activations are never cast.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Operator:
    """A linear map (out, in)."""

    dropout: float = 0.0  # probability of dropping an input while training
    scales_bias: bool = True  # as L: whether the layer's bias is mapped too

    def apply(self, x: Tensor) -> Tensor:
        """X (..., in) -> x M^T (..., out), in the dtype of x."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """M (out, in), in the dtype of the trained tensors; (experts, out, in) for stacked experts."""
        raise NotImplementedError

    def rmul(self, weight: Tensor) -> Tensor:
        """Weight (..., n) -> weight M (..., in), for M as R."""
        return weight @ self.dense().to(weight.dtype)

    def lmul(self, weight: Tensor) -> Tensor:
        """Weight (in, n) -> M weight (out, n), for M as L."""
        return self.dense().to(weight.dtype) @ weight

    def row_squares(self, dtype: torch.dtype) -> Tensor:
        """Squared length of each row of M, (out,)."""
        return self.dense().to(dtype).square().sum(-1)

    def row_products(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight (out, in) -> inner product of each of its rows with that of M, (out,)."""
        return (weight.to(dtype) * self.dense().to(device=weight.device, dtype=dtype)).sum(-1)

    def row_growth(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """By how much M added to weight (out, in) changes the squared length of each row, (out,)."""
        return 2 * self.row_products(weight, dtype) + self.row_squares(dtype).to(weight.device)

    def sample(self) -> Operator:
        """Return the operator of one training step, its random parts drawn."""
        return self

    @property
    def size(self) -> int:
        """Columns of M."""
        raise NotImplementedError
