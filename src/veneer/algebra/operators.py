"""The simplest operators, and how large ones are computed: in pieces, in plain precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator


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


def broadcast_along(vector: Tensor, axis: int, ndim: int) -> Tensor:
    """Reshape (n,) so that it broadcasts on `axis` of a tensor with `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.view(shape)


PIECE = 1 << 18  # elements computed at once of a matrix (out, in) that is never materialised


def rows_at_once(out: int, into: int) -> int:
    """How many rows (in,) of a matrix (out, in) to compute at once: PIECE entries, and a quarter of them at most."""
    return max(1, min(PIECE // into, -(-out // 4)))


def plain_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would compute in half precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
