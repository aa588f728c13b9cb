"""The elementwise product of two low-rank matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .low_rank import Factored
from .operator import Operator
from .operators import plain_precision, rows_at_once
from .protocols import AutogradContext


class Hadamard(Operator):
    """scale * (X1 Y1) * (X2 Y2), entry by entry, with X (out, r) and Y (r, in).

    Its rank is at most r1 r2: row by row, X1 and X2 multiplied by pairs of columns give (out, r1 r2), and Y1 and Y2
    by pairs of rows (r1 r2, in), the Khatri-Rao products (Khatri & Rao 1968), whose product it is. If that costs
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
        k = rows_at_once(X1.shape[0], Y1.shape[1])
        pairs = zip(torch.split(X1, k), torch.split(X2, k), strict=True)
        return torch.cat([x @ ((a @ Y1) * (b @ Y2)).to(x.dtype).T for a, b in pairs], -1)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, X1, Y1, X2, Y2 = ctx.saved_tensors
        k = rows_at_once(X1.shape[0], Y1.shape[1])
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
