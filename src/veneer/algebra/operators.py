"""The operator vocabulary: linear maps that methods return and layer kinds know how to apply.

An operator is a matrix M (out, in) that is rarely formed. `apply(x)` computes x M^T over the last axis of
x (..., in) and is the reference of every faster path; `dense()` is M itself. Operators are built on each
call from the trained tensors, so they hold references only. Small matrices are cast to the dtype of the
activations; activations are never cast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
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


class Dense(Operator):
    """scale * M for a given M (out, in)."""

    def __init__(self, M: Tensor, scale: float = 1.0) -> None:
        self.M, self.scale = M, scale

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype))

    def dense(self) -> Tensor:
        return self.M if self.scale == 1 else self.M * self.scale

    @property
    def size(self) -> int:
        return self.M.shape[-1]


class Diagonal(Operator):
    """diag(v) for v (n,)."""

    def __init__(self, v: Tensor, *, scales_bias: bool = True) -> None:
        self.v, self.scales_bias = v, scales_bias

    def apply(self, x: Tensor) -> Tensor:
        return x * self.v.to(x.dtype)

    def dense(self) -> Tensor:
        return torch.diag(self.v)

    def rmul(self, weight: Tensor) -> Tensor:
        return weight * self.v.to(weight.dtype)

    def lmul(self, weight: Tensor) -> Tensor:
        return weight * self.v.to(weight.dtype)[:, None]

    @property
    def size(self) -> int:
        return self.v.shape[0]


def along(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """Reshape (n,) so that it broadcasts on `axis` of a tensor with `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)


PIECE = 1 << 18  # elements computed at once of a matrix (out, in) that is never materialised


def piece(out: int, into: int) -> int:
    """How many rows (in,) of a matrix (out, in) to compute at once: PIECE entries, and a quarter of them at most."""
    return max(1, min(PIECE // into, -(-out // 4)))


def plain_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would compute in half precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
