"""A layer as part of a fused group: its weight, factors and scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..algebra.low_rank import Factored
from ..algebra.operators import Diagonal
from ..algebra.recursion import Term
from ..algebra.sums import Sum, terms_of
from ..injection.dispatch import AdaptedState
from ..injection.router import adapter_names

if TYPE_CHECKING:
    from ..injection.entries import AdaptedSite
    from ..injection.router import AdapterExpr


PLAIN = (nn.Parameter, Tensor)


class Share(NamedTuple):
    """What one layer brings to a call.

    Attributes:
        W: (out, in), frozen.
        b: (out,) or None, added last.
        A: (r, in).
        B: (out, r).
        d: (out,) or None, the scale of the output's channels.
        scale: s.
        dropout: probability of dropping an entry of x before A.
    """

    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor
    d: Tensor | None
    scale: float
    dropout: float


class Member:
    """One layer with the adapters of one stack: where its share comes from."""

    def __init__(self, site: AdaptedSite, live: tuple[AdapterExpr, ...]) -> None:
        self.site, self.live, self.layer = site, live, site.owner
        self.names: tuple[str, str] | None = None  # of A and B where the operator holds the adapter's own tensors
        self.scale = self.dropout = 0.0

    def plan(self) -> bool:
        """Whether a kernel can say what the adapters do here."""
        if "_hf_hook" in self.layer.__dict__:  # accelerate may keep the weight elsewhere
            return False
        if not self.here():
            return False
        with torch.no_grad():
            links = self.site.terms(self.live)
        if not self.says(links):
            return False
        link = links[0]
        if len(links) == 1 and isinstance(link, Term) and link.left is None and link.shift is None:
            op = link.delta
            if isinstance(op, Factored):
                # A copy, as another thread may attach an adapter meanwhile.
                held = {id(p): name for name, p in dict(self.layer._parameters).items()}
                if id(op.A) in held and id(op.B) in held:
                    self.names = held[id(op.A)], held[id(op.B)]
                    self.scale, self.dropout = float(op.scale), op.dropout
        return True

    def here(self) -> bool:
        """Whether the layer's adapters can be read now. Where each layer gathers its own shards, its siblings' are away."""
        entries = self.site.entries
        return all(type(self.layer._parameters[attr]) in PLAIN
                   for name in adapter_names(self.live) if name in entries for _, attr in entries[name].trained)  # fmt: skip

    def says(self, links: Sequence[Any]) -> bool:
        for link in links:
            if not isinstance(link, Term) or link.right is not None or link.post is not None or link.delta is None:
                return False
            if not all(is_factored(op) for op in terms_of(link.delta)):
                return False
            if link.left is not None and (len(links) > 1 or not isinstance(link.left, Diagonal)):
                return False
        return bool(links)

    def share(self) -> Share | None:
        """The tensors of one call, or None where the layer cannot be read as it is stored now."""
        layer = self.layer
        stored = stored_in(layer, self.site)
        if stored is None or "_hf_hook" in layer.__dict__:
            return None
        W, b = stored  # type: Any, Any
        if self.names is not None:
            A, B = (layer._parameters[name] for name in self.names)
            if type(A) not in PLAIN or type(B) not in PLAIN:
                return None
            return Share(W, b, A, B, None, self.scale, self.dropout if layer.training else 0.0)  # type: ignore[arg-type]
        links = self.site.terms(self.live)
        ops = [op for link in links for op in terms_of(link.delta)]  # type: ignore[union-attr]
        drop = ops[0].dropout if layer.training else 0.0
        if layer.training and any(op.dropout != drop for op in ops):
            return None
        op: Any = ops[0] if len(ops) == 1 else Sum(*ops).joined()
        d = None
        for link in links:
            left, shift = link.left, link.shift  # type: ignore[union-attr]
            if isinstance(left, Diagonal):
                d = left.v
                if b is not None and left.scales_bias:
                    b = b.to(d.dtype) * d
            if shift is not None:
                b = shift if b is None else b.to(shift.dtype) + shift
        return Share(W, b, op.A, op.B, d, op.scale, drop)


def stored_in(layer: nn.Module, site: AdaptedSite) -> tuple[Tensor, Tensor | None] | None:
    """A layer's frozen W (out, in) and b (out,), or None where they are not what they seem."""
    parameters = layer._parameters
    if site.param not in parameters or site.kind.bias not in parameters:  # parametrized, pruned, flattened
        return None
    W, b = parameters[site.param], parameters[site.kind.bias]
    if W is None or type(W) not in PLAIN or W.requires_grad or W.ndim != 2 or (b is not None and b.requires_grad):
        return None
    return site.kind.canonical(site, W), b


def gathers_alone(layer: nn.Module) -> bool:
    """Whether a layer's weights are there only while it runs: ZeRO-3 puts a dict of its own in the place of parameters."""
    return type(layer._parameters) is not dict


def is_factored(op: object) -> bool:
    """Whether the operator is scale B A, of matrices, and nothing more."""
    return isinstance(op, Factored) and op.bare and op.A.ndim == 2


def runs_as_linear(state: AdaptedState) -> bool:
    """Whether the layer's own forward is x W^T + b and nothing more."""
    assert state.main is not None
    own = state.main.kind.own_forward()
    plain = own is not None and state.instance_forward is None and state.base.forward is own
    return plain and not state.main.backend.packed


def runs_itself(state: AdaptedState) -> bool:
    """Whether the layer is a linear one whose weight only its own forward can use."""
    assert state.main is not None
    return state.main.backend.packed and state.main.kind.packable and state.instance_forward is None
