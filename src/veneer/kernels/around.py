"""Low-rank adapters around a layer that computes its own product, such as one of a quantization library.

    y = base(x) + s (x A^T) B^T

The low-rank part is added in place into what the base put out. What is kept for backward is x, which siblings and the
rest of the model share, and x A^T. Siblings share one product with all of their A, and one with its gradient. It is all
in autograd's own operations, which start faster than a function in Python, and the base's product has its own anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..algebra.modes import functions_ready
from .linear import Together, split_by_rank, tensor_version
from .member import PLAIN, Member


class Around(Member):
    """One layer with one stack of adapters; its base runs by itself."""

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r), or None where the layer has to go the long way."""
        if self.names is None or (self.dropout and self.layer.training) or "_hf_hook" in self.layer.__dict__:
            return None
        A, B = (self.layer._parameters.get(name) for name in self.names)
        if A is None or B is None or type(A) not in PLAIN or type(B) not in PLAIN:
            return None
        return A, B

    def output(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """The layer's output (M, out) for x (M, in), given h = x A^T (M, r)."""
        layer: Any = self.layer
        y: Tensor = layer._veneer.call(layer, x)
        if y.dtype != h.dtype:  # autocast, or a layer with a dtype of its own
            return torch.add(y, linear(h, B.to(h.dtype)), alpha=self.scale).to(y.dtype)
        B = B if B.dtype == y.dtype else B.to(y.dtype)
        if y._is_view() or y is x:
            return torch.addmm(y, h, B.t(), alpha=self.scale)
        return y.addmm_(h, B.t(), alpha=self.scale)


def accepts_kind(x: object, member: Around) -> bool:
    """Whether x (..., in) is what the layer takes."""
    return type(x) is Tensor and x.shape[-1] == member.site.fan_in and x.device.type != "meta" and functions_ready()


def reduce_batch(x: Tensor, As: Sequence[Tensor]) -> Tensor:
    """X (M, in) times all A (r_i, in), (M, R), with one product."""
    A = As[0] if len(As) == 1 else torch.cat(tuple(As))  # (R, in)
    return linear(x, A if A.dtype == x.dtype else A.to(x.dtype))


def shape_output(y: Tensor, x: Tensor) -> Tensor:
    """An output (M, out) in the shape of x (..., in)."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


class AroundOne:
    """The kernel of one layer."""

    def __init__(self, member: Around) -> None:
        self.member = member

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        member = self.member
        if layer is not member.layer or not accepts_kind(x, member):
            return None
        found = member.factors()
        if found is None:
            return None
        flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (M, in)
        return shape_output(member.output(flat, reduce_batch(flat, found[:1]), found[1]), x)


class AroundTogether(Together):
    """Layers of one parent that its forward calls on the same input: the first one computes x A^T for all."""

    members: tuple[Around, ...]

    def __init__(self, members: Sequence[Around], parent: nn.Module) -> None:
        super().__init__(members, parent)

    def __call__(self, layer: nn.Module, x: Tensor, at: int) -> Tensor | None:
        member, pending = self.members[at], self.pending
        if layer is not member.layer or not accepts_kind(x, member):
            return None
        found = member.factors()
        if found is None:
            return None
        scope = self.local.scope
        called = scope is not None and scope.parent is self.parent
        flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (M, in)
        if pending.x is x and called:
            h = pending.ys[at]
            if h is not None and pending.version == tensor_version(x) and pending.grad == torch.is_grad_enabled():
                pending.ys[at] = None
                pending.left -= 1
                if not pending.left:
                    pending.x = None
                return shape_output(member.output(flat, h, found[1]), x)
        pending.x = None
        members = self.members[at:] if called and not x.is_inference() else self.members[at : at + 1]
        others = [m.factors() for m in members[1:]]
        pairs = [found, *(o for o in others if o is not None)] if None not in others else [found]
        hs = split_by_rank(reduce_batch(flat, [A for A, _ in pairs]), [B for _, B in pairs])
        self.hold(x, hs, at)
        return shape_output(member.output(flat, hs[0], found[1]), x)
