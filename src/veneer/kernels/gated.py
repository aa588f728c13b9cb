"""A gated feed-forward network whose three linear layers have low-rank adapters, as one function of its input.

    y = down(act(gate(x)) * up(x))

Kept for backward are x, gate(x), up(x) and the low-rank products. act(gate(x)) and the input of `down` are computed
again, element by element; without this an adapter on `down` makes autograd keep them both. Where Triton runs, it
reads and writes them in one pass forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from . import decode, linear, scratch, triton
from .linear import Kept
from .member import Member, Share
from .structure import Gated

if TYPE_CHECKING:
    from ..injection.dispatch import AdaptedState

# Activations of one element at a time that always give the same, so that they can be computed twice.
ACTIVATIONS = {"SiLU", "SiLUActivation", "GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh", "NewGELUActivation"}
ACTIVATIONS |= {"FastGELUActivation", "QuickGELUActivation", "ReLU", "ReLUSquaredActivation", "Tanh", "Sigmoid", "Mish"}
SILU = ("SiLU", "SiLUActivation")
TANH = ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation")  # one formula, written differently
HOME = ("torch.nn.modules.activation", "transformers.activations")


class GatedNetwork:
    """The kernel of one gated feed-forward network."""

    def __init__(self, names: Gated, members: Sequence[Member], state: AdaptedState) -> None:
        self.names, self.state, self.forward = names, state, state.base.forward
        self.members = tuple(members)  # gate, up, down
        self.act: nn.Module | None = None  # the activation, once it is known to be one that we can compute twice
        self.local = members[0].site.router.local

    def activation(self, layer: nn.Module) -> nn.Module | None:
        """The activation, or None where the network is not what it was or somebody watches what is inside it."""
        modules, names = layer._modules, self.names
        if self.state.base.forward is not self.forward:  # replaced on the class
            return None
        gate, up, down = self.members
        parts = modules[names.gate], modules[names.up], modules[names.down]
        if parts[0] is not gate.layer or parts[1] is not up.layer or parts[2] is not down.layer:
            return None
        act: nn.Module = modules[names.act]  # type: ignore[assignment]
        if act is not self.act:
            if not is_plain(act):
                return None
            self.act = act
        if is_watched(act) or is_watched(gate.layer) or is_watched(up.layer) or is_watched(down.layer) or any_global():
            return None
        return act

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        act = self.activation(layer)
        if act is None:
            return None
        gate, up, down = self.members
        held = self.local.decoding
        if held is not None and self not in held and decode.is_token(x):
            above, below = decode.Tokens((gate, up), x), decode.Tokens((down,), x)
            held[self] = (
                partial(decode.decode_gated, above, act, below) if above.fits and below.fits else decode.decline_token
            )
            y = held[self](x)
            if y is not None:
                return y
        shares = (gate.share(), up.share(), down.share())
        if any(s is None for s in shares) or shares[0].dropout != shares[1].dropout:  # type: ignore[union-attr]
            return None
        return run(x, act, shares)  # type: ignore[arg-type]


def is_plain(act: nn.Module) -> bool:
    """Whether the activation is one of those that can be computed twice."""
    kind = type(act)
    if "_veneer" in act.__dict__:  # an adapter is on it
        return False
    return kind.__name__ in ACTIVATIONS and kind.__module__ in HOME and not getattr(act, "inplace", False)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see the module's own calls."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own
    )  # fmt: skip


def any_global() -> bool:
    return bool(
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks
    )  # fmt: skip


def run(x: Tensor, act: nn.Module, shares: tuple[Share, Share, Share]) -> Tensor | None:
    """The output of the network on x (..., in), or None where its layers have to run on their own."""
    gate, up, down = shares
    K = gate.W.shape[1]
    dtype = linear.accepted_dtype(x, gate.W)
    if dtype is None or up.W.shape[1] != K or not gate.W.dtype == up.W.dtype == down.W.dtype:
        return None
    flat = x if x.ndim == 2 else x.reshape(-1, K)  # (M, in)
    *above, scales, p = linear.stack_columns(shares[:2])
    *below, down_scales, down_p = linear.stack_columns(shares[2:])
    trains = torch.is_grad_enabled() and (x.requires_grad or linear.needs_grad(*above[1:], *below[1:]))
    if flat.numel() < linear.SMALL and (trains or p or down_p):
        low = linear.cast_groups(dtype, *above), linear.cast_groups(dtype, *below)
        e, g = linear.compose_forward(flat.to(dtype), *low[0], scales, p)
        y = linear.compose_forward(act(e) * g, *low[1], down_scales, down_p)[0]
    elif trains:
        rules = (scales, p, down_scales, down_p, dtype)
        y = linear.apply(GatedLinear, flat, act, rules, *(t for group in (*above, *below) for t in group))
    else:
        e, g = linear.forward(flat.to(dtype), *linear.cast_groups(dtype, *above), scales, p, keep=False)[0]
        m = inner_forward(act, e, g)
        y = linear.forward(m, *linear.cast_groups(dtype, *below), down_scales, down_p, keep=False)[0][0]
    return linear.unflatten(x, y)


def run_fused(act: nn.Module, e: Tensor) -> str | None:
    """The name that Triton's kernels have for the activation, or None where they do not run for e (M, width)."""
    if not triton.is_available(e) or e.numel() < linear.SMALL:
        return None
    name = type(act).__name__
    if name in SILU:
        return "silu"
    return "gelu_tanh" if name in TANH or getattr(act, "approximate", None) == "tanh" else None


def inner_forward(act: nn.Module, e: Tensor, g: Tensor) -> Tensor:
    """act(e) * g, (M, width), in scratch memory where the activation can be told to write there."""
    name = run_fused(act, e)
    if name is not None:
        return triton.gate_forward(e, g, name)
    silu = type(act).__name__ in SILU
    a: Tensor = torch.ops.aten.silu.out(e, out=scratch.buffer_like("inner", e)) if silu else act(e)
    return a.mul_(g)


def act_backward(act: nn.Module, grad: Tensor, e: Tensor) -> Tensor:
    """The gradient of e from that of act(e)."""
    with torch.enable_grad():
        e = e.detach().requires_grad_()
        return torch.autograd.grad(act(e), e, grad)[0]


def gated_gradients(
    act: nn.Module, e: Tensor, g: Tensor, gy: Tensor, down: Any, remake: bool, masked: bool
) -> tuple[Tensor, Tensor, list[Any]]:
    """The gradients of e and g (M, width), and those of `down`'s tensors, from that of its output.

    Args:
        down: the arguments of `linear.backward` after x.
        remake: whether act(e) * g is made again, as the gradient of down's A wants it.
        masked: whether `down` has dropout.
    """
    name = run_fused(act, e)
    if name is not None:
        made: list[Tensor] = []

        def again(dm: Tensor) -> Tensor:
            made[:] = triton.gate_backward_(dm, e, g, name)
            return made.pop()

        dm, *below = linear.backward((gy,), again if remake else None, *down)
        de, dg = made or triton.gate_backward_(dm, e, g, name, remake=False)  # type: ignore[arg-type]
        return de, dg, below
    # Element by element a few rows at a time, which stay in a core's cache from one step to the next.
    silu = type(act).__name__ in SILU
    a = scratch.buffer_like("gate", e) if silu else act(e)  # (M, width)
    m = scratch.buffer_like("inner", e)
    for part in scratch.row_chunks(e):
        if silu:
            torch.ops.aten.silu.out(e[part], out=a[part])
        if remake:
            torch.mul(a[part], g[part], out=m[part])
    room = scratch.buffer_like("gradient", e) if remake and masked else m  # with dropout, m is read after dm is written
    dm, *below = linear.backward((gy,), m if remake else None, *down, room=room)
    for part in scratch.row_chunks(e):
        gradient = dm[part]  # type: ignore[index]
        a[part].mul_(gradient)
        gradient.mul_(g[part])
        if silu:
            torch.ops.aten.silu_backward.grad_input(gradient, e[part], grad_input=gradient)
    return dm if silu else act_backward(act, dm, e), a, below  # type: ignore[return-value,arg-type]


class GatedLinear(torch.autograd.Function):
    """Takes x (M, in), the activation, (scales and dropout of gate and up, those of down, dtype), then W, b, A, B, d of
    gate and up in pairs, and of down.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: nn.Module, rules: Any, *tensors: Any) -> Any:
        scales, p, down_scales, down_p, dtype = rules
        above = linear.cast_groups(dtype, *[tensors[i : i + 2] for i in range(0, 10, 2)])
        below = linear.cast_groups(dtype, *[tensors[i : i + 1] for i in range(10, 15)])
        low = x if x.dtype == dtype else x.to(dtype)
        (e, g), kept = linear.forward(low, *above, scales, p, True, own=True)  # (M, width) each
        m = inner_forward(act, e, g)  # (M, width)
        (y,), down = linear.forward(m, *below, down_scales, down_p, True)
        need = ctx.needs_input_grad
        ctx.needs = need[0], *(need[i : i + 2] for i in range(5, 13, 2))
        ctx.down_needs = True, *(need[i : i + 1] for i in range(14, 18))
        A_needed, B_needed = any(ctx.needs[2]), any(ctx.needs[3])
        ctx.save_for_backward(
            low if A_needed else None, e, g, kept.A, kept.h if B_needed else None, kept.mask,
            down.A, down.h if need[16] else None, down.mask,
            *above[0], *above[1], *above[3], *above[4], below[0][0], below[3][0], below[4][0],
            *(() if kept.undo else kept.raw), *down.raw,
        )  # fmt: skip
        ctx.act, ctx.scales, ctx.down_scales, ctx.p, ctx.down_p = act, scales, down_scales, p, down_p
        ctx.raws, ctx.undo = len(kept.raw), kept.undo
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, e, g, A, h, mask, down_A, down_h, down_mask, *rest = ctx.saved_tensors
        Ws, bs, Bs, ds, below, raw = rest[:2], rest[2:4], rest[4:6], rest[6:8], rest[8:11], rest[11:]
        if ctx.undo:
            raw = [t for t, d in zip((e, g), ds, strict=True) if d is not None] + raw
        W, B, d = below
        kept = Kept(down_A, down_h, down_mask, raw[ctx.raws :], ctx.down_p)
        down = (W,), (None,), (B,), (d,), kept, ctx.down_scales, ctx.down_needs
        de, dg, last = gated_gradients(ctx.act, e, g, gy, down, ctx.down_needs[2][0], down_mask is not None)
        kept = Kept(A, h, mask, raw[: ctx.raws], ctx.p, ctx.undo)
        dx, *first = linear.backward((de, dg), x, Ws, bs, Bs, ds, kept, ctx.scales, ctx.needs, own=True)
        return (
            dx, None, None, None, None, *(t for group in first for t in group), None, *(t for group in last for t in group)
        )  # fmt: skip
