"""A weight seen as a matrix."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..targets.blocks import SublayerOutput


@dataclass(frozen=True, slots=True)
class Geometry:
    """A weight seen as a matrix (fan_out, fan_in).

    Attributes:
        fan_in: input features or channels; vocabulary for a lookup.
        fan_out: output features or channels; width for a lookup.
        kernel: spatial size of a convolution, else ().
        groups: groups of a convolution, else 1.
        experts: stacked experts of a 3-D parameter, else 0.
        lookup: the input is a tensor of ids (embeddings).
        bias: the layer adds a bias (fan_out,).
        bare: the weight is a parameter that its module uses on its own terms.
    """

    fan_in: int
    fan_out: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 0
    lookup: bool = False
    bias: bool = False
    bare: bool = False


class ResidualTap(threading.local):
    """The input of another module in this call, kept for the site that needs it; one a thread."""

    value: Tensor | None = None

    def __reduce__(self) -> tuple[type[ResidualTap], tuple[()]]:
        return ResidualTap, ()


class Weight(Protocol):
    """A site as layer kinds see it: one weight of a module, with its sizes.

    Attributes:
        name: dotted name in the base model.
        owner: the module that holds the weight.
        param: name of the weight on `owner`.
        backend: how the weight is stored.
        spot: the sub-layer whose output the site is, or None.
        tap: the residual stream there.
    """

    name: str
    owner: nn.Module
    param: str
    backend: Any
    fan_in: int
    fan_out: int
    kernel: tuple[int, ...]
    groups: int
    experts: int
    spot: SublayerOutput | None
    tap: ResidualTap

    @property
    def patch(self) -> int: ...
    @property
    def float_dtype(self) -> torch.dtype: ...
    def stored(self) -> Tensor: ...
    def current_weight(self) -> Tensor: ...
    def current_bias(self) -> Tensor | None: ...
