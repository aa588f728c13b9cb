"""Low-rank operators and the factorizations that make them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_diagonal import ungroup_blocks
from .operator import Operator
from .operators import PIECE, broadcast_along, rows_at_once


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
        return h if self.inner is None else h * broadcast_along(self.inner.to(h.dtype), axis, h.ndim)

    def finish(self, y: Tensor, axis: int = -1) -> Tensor:
        """Scale the out channels of y on `axis`."""
        if self.outer is not None:
            y = y * broadcast_along(self.outer.to(y.dtype), axis, y.ndim)
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
        return ungroup_blocks(self.B, self.groups) if self.groups > 1 else self.B

    def dense(self) -> Tensor:
        A = self.A if self.inner is None else self.inner[:, None] * self.A  # (r, in)
        B = self.full_B() if self.outer is None else self.outer[:, None] * self.full_B()  # (out, r)
        return (B @ A.to(B.dtype)) * self.scale

    def row_squares(self, dtype: torch.dtype) -> Tensor:
        B, A = self.grouped(dtype)
        return (torch.bmm(B, torch.bmm(A, A.transpose(1, 2))) * B).sum(-1).flatten()  # <B (A A^T), B>

    def row_products(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Operator.row_products`; weight is (out, in / groups) if there are groups."""
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
        return torch.cat(
            [w.to(A.dtype) @ A.transpose(1, 2) for w in torch.split(weight, rows_at_once(out, into), 1)], 1
        )
    k = rows_at_once(into, out)  # stored by columns
    total = A.new_zeros(n, A.shape[1], out)
    for w, a in zip(torch.split(weight, k, 2), torch.split(A, k, 2), strict=True):
        total = torch.baddbmm(total, a, w.to(A.dtype).transpose(1, 2))
    return total.transpose(1, 2)


def low_rank(B: Tensor, A: Tensor, r: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r part of a product (Eckart & Young 1936), without the product: QR of both, SVD of the small core.

    Args:
        B: (..., out, k).
        A: (..., k, in).
        r: rank; the factors are padded with zeros if the product has fewer singular values.
        driver: cuSOLVER's algorithm, of `torch.linalg.svd`.

    Returns:
        B (..., out, r) that holds the singular values, A (..., r, in), and all singular values (..., k).
    """
    Q, R = torch.linalg.qr(B)  # (..., out, k), (..., k, k)
    P, S = torch.linalg.qr(A.mT)  # (..., in, k), (..., k, k)
    U, s, V = torch.linalg.svd(R @ S.mT, full_matrices=False, driver=driver)
    return (*fit_factors(Q @ (U * s[..., None, :]), V @ P.mT, r), s)


def best_rank(M: Tensor, r: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r part of M (..., out, in); returns as `low_rank`."""
    U, s, V = torch.linalg.svd(M, full_matrices=False, driver=driver)
    return (*fit_factors(U * s[..., None, :], V, r), s)


def fit_factors(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B (..., out, k) and A (..., k, in) cut off, or filled up with zeros, at rank r."""
    spare = max(0, r - B.shape[-1])
    return F.pad(B[..., :r], (0, spare)), F.pad(A[..., :r, :], (0, 0, 0, spare))
