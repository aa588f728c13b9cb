"""A weight seen as a matrix."""

from __future__ import annotations

from dataclasses import dataclass


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
