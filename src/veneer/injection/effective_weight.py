"""A shallow copy of a layer with its effective weight, for one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    pass

from typing import TYPE_CHECKING

from ..layers.stand_in import stand_in

if TYPE_CHECKING:
    from ..algebra.recursion import Fork, Link
    from ..layers.site import Site


def with_weights(target: nn.Module, layer: nn.Module, site: Site, links: list[Link | Fork]) -> nn.Module:
    """A stand-in for `target` in which the site's parameter has its effective value."""
    value, bias = site.kind.lazy(site, links), site.current_bias()
    if value is None:
        weight, bias = site.kind.compose(site, links, site.current_weight(), bias)
        value = site.kind.restored(site, weight)
    if target is layer:
        target = stand_in(layer)
    if site.owner is layer:
        target._parameters[site.param] = value  # type: ignore[assignment]
        if site.geometry.bias:
            target._parameters[site.kind.bias] = bias  # type: ignore[assignment]
        return target
    for child_name, child in layer._modules.items():
        if child is site.owner:
            child_target = stand_in(child)
            child_target._parameters[site.param] = value  # type: ignore[assignment]
            if site.geometry.bias:
                child_target._parameters[site.kind.bias] = bias  # type: ignore[assignment]
            target._modules[child_name] = child_target
    return target
