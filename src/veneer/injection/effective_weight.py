"""A shallow copy of a layer with its effective weight, for one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..backends.base import put_tensor
from ..layers.shallow_copy import shallow_copy

if TYPE_CHECKING:
    from ..algebra.recursion import Branches, Term
    from ..injection.entries import AdaptedSite


def with_effective_weight(
    target: nn.Module, layer: nn.Module, site: AdaptedSite, links: list[Term | Branches]
) -> nn.Module:
    """A stand-in for `target` in which the site's parameter has its effective value."""
    value, bias = site.kind.lazy(site, links), site.current_bias()
    if value is None:
        weight, bias = site.kind.compose(site, links, site.current_weight(), bias)
        value = site.kind.restored(site, weight)
    if target is layer:
        target = shallow_copy(layer)
    if site.owner is layer:
        put_tensor(target, site.param, value)
        if site.geometry.bias:
            put_tensor(target, site.kind.bias, bias)
        return target
    for child_name, child in layer._modules.items():
        if child is site.owner:
            child_target = shallow_copy(child)
            put_tensor(child_target, site.param, value)
            if site.geometry.bias:
                put_tensor(child_target, site.kind.bias, bias)
            target._modules[child_name] = child_target
    return target
