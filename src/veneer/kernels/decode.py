"""Single tokens, one after another: what `generate` asks of adapted layers, with as little between as can be.

    y_i = W_i x + s_i B_i (A_i x) + b_i

Within one `generate` no parameter changes, so the first token of a layer, or of layers that share an input, leaves what
the next ones need: all A in one matrix, each B stored transposed, and room for A x. For one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from .member import Member

    Serve = Callable[[Tensor], Tensor | None]  # x (..., in) of one token -> y (..., out)


class Tokens:
    """Layers that share an input. The first that is called computes those after it too.

    Args:
        members: in the order of the calls.
        x: a tensor of the dtype and on the device of the tokens that will come, (..., in).
    """

    def __init__(self, members: Sequence[Member], x: Tensor) -> None:
        shares: Any = [member.share() for member in members]
        self.fits = all(
            s is not None and s.W.dtype == x.dtype and s.W.device == x.device and s.d is None and not s.dropout
            for s in shares
        ) and not torch.is_autocast_enabled(x.device.type)  # it converts, and not into room that is given
        self.x: Tensor | None = None  # what `ys` are for
        self.version = 0
        self.ys: list[Tensor | None] = [None] * len(shares)  # not yet asked for
        if not self.fits:
            return
        dtype, device = x.dtype, x.device
        self.dtype, self.K = dtype, shares[0].W.shape[1]
        with torch.no_grad():
            As = [s.A.to(dtype) for s in shares]
            self.A = As[0] if len(As) == 1 else torch.cat(As)  # (R, in)
            self.h = torch.empty(self.A.shape[0], dtype=dtype, device=device)
            parts = torch.split(self.h, [A.shape[0] for A in As])
            Bs = [s.B.to(dtype).t().contiguous().t() for s in shares]  # (out, r), stored transposed
        biases = [None if s.b is None else s.b.to(dtype) for s in shares]
        self.parts = [(s.W, b, B, s.scale, h) for s, b, B, h in zip(shares, biases, Bs, parts, strict=True)]

    def all(self, x: Tensor, start: int = 0) -> list[Tensor] | None:
        """The outputs of the layers from `start` on, or None where x is not such a token."""
        if x.numel() != self.K or x.dtype is not self.dtype or torch.is_grad_enabled():
            return None
        torch.mv(self.A, x.view(-1), out=self.h)
        ys = []
        for W, b, B, scale, h in self.parts[start:] if start else self.parts:
            y = linear(x, W, b)  # (..., out)
            y.view(-1).addmv_(B, h, alpha=scale)
            ys.append(y)
        return ys

    def one(self, at: int, x: Tensor) -> Tensor | None:
        """The output of one layer, computed with those before it where these had the same x."""
        if self.x is x and self.version == x._version:
            y = self.ys[at]
            if y is not None:
                self.ys[at] = None
                return y
        made = self.all(x, at)
        if made is None:
            return None
        if len(made) > 1:
            self.x, self.version = x, x._version
            self.ys[at + 1 :] = made[1:]
        return made[0]


def serve_token(held: dict[Any, Serve], kernels: Sequence[Any], members: Sequence[Member], x: Tensor) -> None:
    """Let `held` serve the kernels of layers that share an input, if they can be, from the next token on."""
    # Writes to a tensor of inference mode are not counted, so nothing would tell that x is still the same.
    groups = [(m,) for m in members] if x.is_inference() else [tuple(members)]
    at = 0
    for group in groups:
        tokens = Tokens(group, x)
        for i in range(len(group)):
            held[kernels[at]] = partial(tokens.one, i) if tokens.fits else decline_token
            at += 1


def decline_token(x: Tensor) -> None:
    """What is held where single tokens take the usual way."""


def decode_gated(above: Tokens, act: nn.Module, below: Tokens, x: Tensor) -> Tensor | None:
    """A gated feed-forward network on one token."""
    made = above.all(x)
    if made is None:
        return None
    e, g = made
    down = below.all(act(e).mul_(g))
    return None if down is None else down[0]


def is_token(x: Tensor) -> bool:
    """Whether x (..., in) is one token that nothing is trained on."""
    return x.numel() == x.shape[-1] and not torch.is_grad_enabled() and type(x) is Tensor
