"""Trained copies of a base tensor: how they begin, what they change, and their weighted combinations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..algebra.operator import Operator
from ..algebra.operators import Dense
from ..layers.site import Site


def init_copy(site: Site) -> Tensor:
    """A trained copy of the site's weight, in the layer's own layout."""
    stored = site.stored()
    return site.computed(tuple(stored.shape), lambda: stored)


def copy_delta(copied: Tensor, site: Site) -> Operator:
    """The change (out, in) that a trained copy of the weight makes."""
    return Dense(site.matrix(copied) - site.weight().to(device=copied.device, dtype=copied.dtype))


def combine_copies(own: Tensor, copies: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """A base tensor plus the weighted sum of what its trained copies change it by."""
    start = own.to(copies[0])
    total = start.clone()
    for copied, weight in zip(copies, weights, strict=True):
        total = total + (copied - start) * weight
    return total
