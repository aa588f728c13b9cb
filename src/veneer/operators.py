"""The operator vocabulary: linear maps that methods return and layer kinds know how to apply.

An operator is a matrix M (out, in) that is rarely formed. `apply(x)` computes x M^T over the last axis of
x (..., in) and is the reference of every faster path; `dense()` is M itself. Operators are built on each
call from the trained tensors, so they hold references only. Small matrices are cast to the dtype of the
activations; activations are never cast.
"""

from __future__ import annotations

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

    def sample(self) -> Operator:
        """Return the operator of one training step, its random parts drawn."""
        return self

    @property
    def size(self) -> int:
        """Columns of M."""
        raise NotImplementedError


class Factored(Operator):
    """scale * diag(outer) B diag(inner) A, with B (out, r) and A (r, in).

    Args:
        B: (out, r), or (experts, out, r).
        A: (r, in), or (experts, r, in).
        scale: a number.
        dropout: probability of dropping an entry of x while training.
        groups: B is block diagonal in this many blocks and given as (out, r / groups).
        inner: (r,) or None.
        outer: (out,) or None.
    """

    def __init__(
        self,
        B: Tensor,
        A: Tensor,
        scale: float = 1.0,
        *,
        dropout: float = 0.0,
        groups: int = 1,
        inner: Tensor | None = None,
        outer: Tensor | None = None,
    ) -> None:
        self.B, self.A, self.scale = B, A, scale
        self.dropout, self.groups, self.inner, self.outer = dropout, groups, inner, outer

    def middle(self, h: Tensor, axis: int = -1) -> Tensor:
        """Scale the r channels of h on `axis`."""
        return h if self.inner is None else h * along(self.inner.to(h.dtype), axis, h.ndim)

    def finish(self, y: Tensor, axis: int = -1) -> Tensor:
        """Scale the out channels of y on `axis`."""
        if self.outer is not None:
            y = y * along(self.outer.to(y.dtype), axis, y.ndim)
        return y if self.scale == 1 else y * self.scale

    def apply(self, x: Tensor) -> Tensor:
        h = self.middle(F.linear(x, self.A.to(x.dtype)))  # (..., r)
        return self.finish(F.linear(h, self.full_B().to(x.dtype)))  # (..., out)

    def full_B(self) -> Tensor:
        """B without its grouping, (out, r)."""
        return ungroup(self.B, self.groups) if self.groups > 1 else self.B

    def dense(self) -> Tensor:
        A = self.A if self.inner is None else self.inner[:, None] * self.A  # (r, in)
        B = self.full_B() if self.outer is None else self.outer[:, None] * self.full_B()  # (out, r)
        return (B @ A.to(B.dtype)) * self.scale

    @property
    def size(self) -> int:
        return self.A.shape[-1]


class Dense(Operator):
    """scale * M for a given M (out, in).

    Args:
        row_dropout: probability of dropping a whole output row while training; the kept rows are scaled so
            that the mean of the mask is 1.
        skip: probability of leaving the whole operator out of a training step.
    """

    def __init__(self, M: Tensor, scale: float = 1.0, *, row_dropout: float = 0.0, skip: float = 0.0) -> None:
        self.M, self.scale, self.row_dropout, self.skip = M, scale, row_dropout, skip

    def sample(self) -> Operator:
        M = self.M
        if self.row_dropout:
            keep = (torch.rand(M.shape[0], 1, device=M.device) > self.row_dropout).to(M.dtype)  # (out, 1)
            M = M * (keep / keep.mean().clamp_min(1e-12))
        if self.skip:
            M = M * (torch.rand(1, device=M.device) > self.skip).to(M.dtype)
        return Dense(M, self.scale)

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
        skip: probability, for each block, of being the identity in a training step.
    """

    def __init__(self, blocks: Tensor, *, skip: float = 0.0) -> None:
        self.blocks, self.skip = blocks, skip

    def sample(self) -> Operator:
        if not self.skip:
            return self
        n, b, _ = self.blocks.shape
        keep = torch.rand(n, 1, 1, device=self.blocks.device) >= self.skip
        eye = torch.eye(b, dtype=self.blocks.dtype, device=self.blocks.device)
        return BlockDiagonal(torch.where(keep, self.blocks, eye))

    def apply(self, x: Tensor) -> Tensor:
        n, b, _ = self.blocks.shape
        parts = x.reshape(*x.shape[:-1], n, b)
        return torch.einsum("...nb,nab->...na", parts, self.blocks.to(x.dtype)).reshape(x.shape)

    def dense(self) -> Tensor:
        return block_diagonal(self.blocks)

    def rmul(self, weight: Tensor) -> Tensor:
        n, b, _ = self.blocks.shape
        parts = weight.reshape(*weight.shape[:-1], n, b)
        return torch.einsum("...na,nab->...nb", parts, self.blocks.to(weight.dtype)).reshape(weight.shape)

    def lmul(self, weight: Tensor) -> Tensor:
        n, b, _ = self.blocks.shape
        parts = weight.reshape(n, b, -1)
        return torch.bmm(self.blocks.to(weight.dtype), parts).reshape(weight.shape)

    @property
    def size(self) -> int:
        return self.blocks.shape[0] * self.blocks.shape[1]


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

    @property
    def size(self) -> int:
        return self.terms[0].size


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
