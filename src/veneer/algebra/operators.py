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


class BlockDiagonal(Operator):
    """blkdiag(M_1 ... M_n) for blocks (n, b, b).

    Args:
        count: n, where blocks is (1, b, b) and that one block is repeated.
        skip: probability, for each block, of being the identity in a training step.
    """

    def __init__(self, blocks: Tensor, *, count: int | None = None, skip: float = 0.0) -> None:
        self.blocks, self.skip = blocks, skip
        self.count = blocks.shape[0] if count is None else count

    @property
    def all_blocks(self) -> Tensor:
        """(n, b, b), a view where one block is repeated."""
        return self.blocks.expand(self.count, -1, -1)

    @property
    def alike(self) -> bool:
        """One block, repeated."""
        return self.blocks.shape[0] == 1

    def sample(self) -> Operator:
        if not self.skip:
            return self
        b = self.blocks.shape[-1]
        keep = torch.rand(self.count, 1, 1, device=self.blocks.device) >= self.skip
        eye = torch.eye(b, dtype=self.blocks.dtype, device=self.blocks.device)
        return BlockDiagonal(torch.where(keep, self.blocks, eye))

    def apply(self, x: Tensor) -> Tensor:
        return self.times(x, self.blocks.to(x.dtype).transpose(1, 2))

    def dense(self) -> Tensor:
        return block_diagonal(self.all_blocks)

    def rmul(self, weight: Tensor) -> Tensor:
        return self.times(weight, self.blocks.to(weight.dtype))

    def times(self, x: Tensor, blocks: Tensor) -> Tensor:
        """X (..., n b) times blkdiag(blocks)."""
        b = blocks.shape[-1]
        if self.alike:
            return (x.reshape(-1, b) @ blocks[0]).view(x.shape)
        parts = x.reshape(-1, self.count, b).transpose(0, 1)  # (n, rows, b)
        return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)

    def lmul(self, weight: Tensor) -> Tensor:
        parts = weight.reshape(self.count, self.blocks.shape[-1], -1)
        return torch.matmul(self.blocks.to(weight.dtype), parts).reshape(weight.shape)

    @property
    def size(self) -> int:
        return self.count * self.blocks.shape[1]


class Rows(Operator):
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


def block_diagonal(blocks: Tensor) -> Tensor:
    """(n, a, b) -> (n a, n b) with the blocks on its diagonal."""
    n, a, b = blocks.shape
    full = blocks.new_zeros(n, a, n, b)
    return full.diagonal_scatter(blocks.permute(1, 2, 0), 0, 0, 2).reshape(n * a, n * b)


def along(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """Reshape (n,) so that it broadcasts on `axis` of a tensor with `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)


def ungroup(matrix: Tensor, groups: int) -> Tensor:
    """(out, n) with grouped columns -> block-diagonal (out, n * groups)."""
    out, n = matrix.shape
    blocks = matrix.view(groups, out // groups, n)
    return block_diagonal(blocks)


def regroup(matrix: Tensor, groups: int) -> Tensor | None:
    """Inverse of `ungroup`, or None where an entry off the blocks is not zero."""
    out, n = matrix.shape
    blocks = matrix.view(groups, out // groups, groups, n // groups)
    kept = torch.stack([blocks[g, :, g] for g in range(groups)])  # (groups, out / groups, n / groups)
    if int(matrix.count_nonzero()) != int(kept.count_nonzero()):
        return None
    return kept.reshape(out, n // groups)


PIECE = 1 << 18  # elements of a matrix (out, in) that are computed at once where it is never held whole


def piece(out: int, into: int) -> int:
    """How many rows (in,) of a matrix (out, in) to compute at once: PIECE entries, and a quarter of them at most."""
    return max(1, min(PIECE // into, -(-out // 4)))


def plain_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would compute in half precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
