"""A gated feed-forward network with low-rank adapters around layers that compute their own product, such as those of a
quantization library.

    y = down(act(gate(x)) * up(x))

The layers' products are the library's. Between them, what is kept for backward is gate(x) and up(x), which the library's
backward does not need; act(gate(x)) and the input of `down` are computed again. Autograd alone keeps all four, which is
more than a quantized weight saves where there are many tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import linear
from .around import Around, accepts_kind, reduce_batch, shape_output
from .gated import GatedNetwork, act_backward
from .linear import split_by_rank


class AroundGated(GatedNetwork):
    """The kernel of one such network, while it trains."""

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        gate, up, down = self.members
        assert isinstance(gate, Around) and isinstance(up, Around) and isinstance(down, Around)
        if not torch.is_grad_enabled() or not accepts_kind(x, gate) or x.numel() < linear.SMALL:
            return None
        act = self.activation(layer)
        found = gate.factors(), up.factors(), down.factors()
        if act is None or None in found or torch.is_autocast_enabled(x.device.type):
            return None
        (gate_A, gate_B), (up_A, up_B), (down_A, down_B) = found  # type: ignore[misc]
        flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (M, in)
        hs = split_by_rank(reduce_batch(flat, (gate_A, up_A)), (gate_B, up_B))  # (M, r) each
        e, g = gate.output(flat, hs[0], gate_B), up.output(flat, hs[1], up_B)  # (M, width) each
        m, h = linear.apply(Inner, e, g, down_A, act)  # (M, width), (M, r)
        return shape_output(down.output(m, h, down_B), x)


class Inner(torch.autograd.Function):
    """E and g (M, width), A (r, width) and the activation -> m = act(e) * g, (M, width), and m A^T, (M, r)."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, g: Tensor, A: Tensor, act: nn.Module) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(e, g, A)
        ctx.act = act
        m = act(e).mul_(g)
        return m, m @ A.t().to(m.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gm: Tensor | None, gh: Tensor | None) -> Any:
        e, g, A = ctx.saved_tensors
        act, dA = ctx.act, None
        need_e, need_g, need_A, _ = ctx.needs_input_grad
        a = act(e)  # (M, width)
        if need_A and gh is not None:
            dA = (gh.t() @ (a * g)).to(A.dtype)  # (r, width)
        if gh is not None:
            low = A.to(gh.dtype)
            gm = gh @ low if gm is None else torch.addmm(gm, gh, low)  # (M, width)
        if gm is None:
            return None, None, None, None
        dg = a.mul_(gm) if need_g else None
        return act_backward(act, gm * g, e) if need_e else None, dg, dA, None
