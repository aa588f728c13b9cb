"""The operator vocabulary: linear maps that methods return and layer kinds know how to apply.

An operator is a matrix M (out, in) that is rarely formed. `apply(x)` computes x M^T over the last axis of
x (..., in) and is the reference of every faster path; `dense()` is M itself. Operators are built on each
call from the trained tensors, so they hold references only. Small matrices are cast to the dtype of the
activations; activations are never cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 1 << 18  # elements of a matrix (out, in) that are computed at once where it is never held whole


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
        h = F.linear(x, self.A.to(x.dtype))  # (..., r)
        if self.folds(h.numel() // h.shape[-1]):
            return F.linear(h, self.folded_B().to(x.dtype))  # (..., out)
        return self.finish(F.linear(self.middle(h), self.full_B().to(x.dtype)))

    def folds(self, rows: int) -> bool:
        """Whether B is scaled, rather than h and y of so many rows: it has fewer entries, and they would be kept."""
        return self.outer is not None and self.groups == 1 and rows > self.A.shape[0]

    def folded_B(self) -> Tensor:
        """B with `scale`, `outer` and `inner` in it, (out, r)."""
        if self.inner is not None and self.outer is not None:
            B = self.B * torch.outer(self.outer, self.inner)  # in this order nothing (out, r) is kept but B
        elif self.outer is not None:
            B = self.B * self.outer[:, None]
        else:
            B = self.B if self.inner is None else self.B * self.inner
        return B if self.scale == 1 else B * self.scale

    def full_B(self) -> Tensor:
        """B without its grouping, (out, r)."""
        return ungroup(self.B, self.groups) if self.groups > 1 else self.B

    def dense(self) -> Tensor:
        A = self.A if self.inner is None else self.inner[:, None] * self.A  # (r, in)
        B = self.full_B() if self.outer is None else self.outer[:, None] * self.full_B()  # (out, r)
        return (B @ A.to(B.dtype)) * self.scale

    def row_squares(self, dtype: torch.dtype) -> Tensor:
        B, A = self.grouped(dtype)
        return (torch.bmm(B, torch.bmm(A, A.transpose(1, 2))) * B).sum(-1).flatten()  # <B (A A^T), B>

    def row_products(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Operator.row_products`; weight (out, in / groups) where there are groups."""
        B, A = self.grouped(dtype, weight.device, own_columns=True)
        parts = weight.view(self.groups, -1, weight.shape[1])  # (groups, out / groups, in / groups)
        return (rows_times(parts, A) * B).sum(-1).flatten()  # <W A^T, B>

    def row_growth(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.groups > 1 or weight.dtype != dtype or weight.stride(-1) != 1:
            return super().row_growth(weight, dtype)
        (B,), (A,) = self.grouped(dtype, weight.device)
        both = torch.addmm(B @ (A @ A.t()), weight, A.t(), alpha=2)  # 2 W A^T + B (A A^T), (out, r)
        growth: Tensor = torch.linalg.vecdot(both, B)
        return growth

    def grouped(
        self, dtype: torch.dtype, device: torch.device | None = None, *, own_columns: bool = False
    ) -> tuple[Tensor, Tensor]:
        """B (groups, out / groups, r / groups) and A (groups, r / groups, in), their scales in B and A.

        Args:
            own_columns: of A, only the columns of its group, (groups, r / groups, in / groups).
        """
        g = self.groups
        B = self.B.to(device=device, dtype=dtype) * self.scale
        A = self.A.to(device=device, dtype=dtype)
        if self.outer is not None:
            B = B * self.outer.to(B)[:, None]
        if self.inner is not None:
            A = A * self.inner.to(A)[:, None]
        A = A.view(g, -1, A.shape[1])
        if own_columns and g > 1:
            A = A.view(g, -1, g, A.shape[2] // g).diagonal(0, 0, 2).permute(2, 0, 1)
        return B.view(g, -1, B.shape[1]), A

    @property
    def bare(self) -> bool:
        """Whether it is scale B A and nothing more."""
        return self.inner is None and self.outer is None and self.groups == 1

    @property
    def size(self) -> int:
        return self.A.shape[-1]


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


class Hadamard(Operator):
    """scale * (X1 Y1) * (X2 Y2), entry by entry, with X (out, r) and Y (r, in).

    Its rank is at most r1 r2: row by row, X1 and X2 multiplied by pairs of columns give (out, r1 r2), and Y1 and Y2
    by pairs of rows (r1 r2, in), the Khatri-Rao products (Khatri & Rao 1968), whose product it is. Where that costs
    more than M itself, M is computed piece by piece, and again in the backward.

    Args:
        row_dropout: probability of dropping a whole output row while training; the kept rows are scaled so
            that the mean of the mask is 1.
        skip: probability of leaving the whole operator out of a training step.
    """

    def __init__(
        self,
        X1: Tensor,
        Y1: Tensor,
        X2: Tensor,
        Y2: Tensor,
        scale: float = 1.0,
        *,
        row_dropout: float = 0.0,
        skip: float = 0.0,
    ) -> None:
        self.X1, self.Y1, self.X2, self.Y2, self.scale = X1, Y1, X2, Y2, scale
        self.row_dropout, self.skip = row_dropout, skip

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X1 with the scale in it, Y1, X2, Y2."""
        return self.X1 if self.scale == 1 else self.X1 * self.scale, self.Y1, self.X2, self.Y2

    @property
    def thin(self) -> bool:
        """Whether the factors of rank r1 r2 cost no more than M."""
        out, into = self.X1.shape[0], self.Y1.shape[1]
        return self.X1.shape[1] * self.X2.shape[1] * (out + into) <= out * into

    def factored(self) -> Factored:
        """The same map as B (out, r1 r2) and A (r1 r2, in)."""
        X1, Y1, X2, Y2 = self.factors
        return Factored((X1[:, :, None] * X2[:, None]).flatten(1), (Y1[:, None] * Y2[None]).flatten(0, 1))

    def sample(self) -> Operator:
        X1 = self.X1
        if self.row_dropout:
            keep = (torch.rand(X1.shape[0], 1, device=X1.device) > self.row_dropout).to(X1.dtype)  # (out, 1)
            X1 = X1 * (keep / keep.mean().clamp_min(1e-12))
        if self.skip:
            X1 = X1 * (torch.rand(1, device=X1.device) > self.skip).to(X1.dtype)
        return Hadamard(X1, self.Y1, self.X2, self.Y2, self.scale)

    def apply(self, x: Tensor) -> Tensor:
        if self.thin:
            return self.factored().apply(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with plain_precision(x.device):
            y: Tensor = _InPieces.apply(x.reshape(-1, x.shape[-1]), *self.factors)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], -1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids (...) int -> the columns they name, (..., out)."""
        X1, Y1, X2, Y2 = self.factors
        return F.linear(F.embedding(ids, Y1.T), X1) * F.linear(F.embedding(ids, Y2.T), X2)

    def dense(self) -> Tensor:
        product = (self.X1 @ self.Y1) * (self.X2 @ self.Y2)
        return product if self.scale == 1 else product * self.scale

    @property
    def size(self) -> int:
        return self.Y1.shape[-1]


class _InPieces(torch.autograd.Function):
    """X (n, in) -> x M^T (n, out) for M = (X1 Y1) * (X2 Y2), of which a few rows at a time are held."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, X1: Tensor, Y1: Tensor, X2: Tensor, Y2: Tensor) -> Tensor:
        k = piece(X1.shape[0], Y1.shape[1])
        pairs = zip(torch.split(X1, k), torch.split(X2, k), strict=True)
        return torch.cat([x @ ((a @ Y1) * (b @ Y2)).to(x.dtype).T for a, b in pairs], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, X1, Y1, X2, Y2 = ctx.saved_tensors
        k = piece(X1.shape[0], Y1.shape[1])
        gx: Tensor | None = None
        gY1, gY2, gX1, gX2 = torch.zeros_like(Y1), torch.zeros_like(Y2), [], []
        # Written without in-place operations, so that it has a derivative itself.
        for a, b, gy in zip(torch.split(X1, k), torch.split(X2, k), torch.split(grads[0], k, -1), strict=True):
            P1, P2 = a @ Y1, b @ Y2  # (k, in)
            if ctx.needs_input_grad[0]:
                M = (P1 * P2).to(gy.dtype)
                gx = gy @ M if gx is None else torch.addmm(gx, gy, M)
            gM = (gy.T @ x).to(P1.dtype)  # (k, in)
            g1, g2 = gM * P2, gM * P1
            gX1.append(g1 @ Y1.T)
            gX2.append(g2 @ Y2.T)
            gY1, gY2 = torch.addmm(gY1, a.T, g1), torch.addmm(gY2, b.T, g2)
        return gx, torch.cat(gX1), gY1, torch.cat(gX2), gY2


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
        """One operator with the factors of all terms side by side, where they have factors."""
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


def terms(op: Operator | None) -> Sequence[Operator]:
    """What is added up in an operator: itself, or the terms of a sum; nothing for None."""
    if op is None:
        return ()
    return [t for term in op.terms for t in terms(term)] if isinstance(op, Sum) else (op,)


def piece(out: int, into: int) -> int:
    """How many rows (in,) of a matrix (out, in) to compute at once: PIECE entries, and a quarter of them at most."""
    return max(1, min(PIECE // into, -(-out // 4)))


def rows_times(weight: Tensor, A: Tensor) -> Tensor:
    """(n, out, in), (n, r, in) -> weight A^T (n, out, r) in the dtype of A, of which weight gets no copy."""
    by_rows = weight.stride(1) >= weight.stride(2)
    if weight.dtype == A.dtype:  # BLAS is twice as fast with the matrix as it is stored
        return torch.bmm(weight, A.transpose(1, 2)) if by_rows else torch.bmm(A, weight.transpose(1, 2)).transpose(1, 2)
    n, out, into = weight.shape
    if n > 1:
        k = max(1, min(PIECE // (out * into), -(-n // 4)))
        pairs = zip(torch.split(weight, k), torch.split(A, k), strict=True)
        return torch.cat([torch.bmm(w.to(A.dtype), a.transpose(1, 2)) for w, a in pairs])
    if by_rows:
        return torch.cat([w.to(A.dtype) @ A.transpose(1, 2) for w in torch.split(weight, piece(out, into), 1)], 1)
    k = piece(into, out)  # stored by columns
    total = A.new_zeros(n, A.shape[1], out)
    for w, a in zip(torch.split(weight, k, 2), torch.split(A, k, 2), strict=True):
        total = torch.baddbmm(total, a, w.to(A.dtype).transpose(1, 2))
    return total.transpose(1, 2)


def plain_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would compute in half precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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


def low_rank(B: Tensor, A: Tensor, r: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r part of a product (Eckart & Young 1936), without the product: QR of both, SVD of the small core.

    Args:
        B: (..., out, k).
        A: (..., k, in).
        r: rank; the factors are filled up with zeros where the product has fewer singular values.
        driver: cuSOLVER's algorithm, of `torch.linalg.svd`.

    Returns:
        B (..., out, r) that holds the singular values, A (..., r, in), and all singular values (..., k).
    """
    Q, R = torch.linalg.qr(B)  # (..., out, k), (..., k, k)
    P, S = torch.linalg.qr(A.mT)  # (..., in, k), (..., k, k)
    U, s, V = torch.linalg.svd(R @ S.mT, full_matrices=False, driver=driver)
    return (*fitted(Q @ (U * s[..., None, :]), V @ P.mT, r), s)


def best_rank(M: Tensor, r: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r part of M (..., out, in); returns as `low_rank`."""
    U, s, V = torch.linalg.svd(M, full_matrices=False, driver=driver)
    return (*fitted(U * s[..., None, :], V, r), s)


def fitted(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B (..., out, k) and A (..., k, in) cut off, or filled up with zeros, at rank r."""
    spare = max(0, r - B.shape[-1])
    return F.pad(B[..., :r], (0, spare)), F.pad(A[..., :r, :], (0, 0, 0, spare))
