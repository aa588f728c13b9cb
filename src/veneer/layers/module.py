"""Whole modules, such as an attention or a block's output, whose output an adapter maps."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..site import Fork, Geometry
from .kind import LayerKind

if TYPE_CHECKING:
    from ..site import Site, Takeover
    from .kind import Links


class Module(LayerKind):
    """A module of any arguments; the first of its outputs is what `post` maps.

    Where the site is a place in a block, `post` also finds the residual stream there among the arguments, under the
    name of the module whose input it is.
    """

    name = "module"
    param = ""

    def matches(self, module: nn.Module) -> bool:
        return False  # named by methods that act on modules

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        return Geometry(0, 0)

    def forward(
        self, site: Site, state: Takeover, target: nn.Module, links: Links, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        outputs = state.inner(target, state.router.live(), args, kwargs)
        inputs = {**dict(zip(arguments(state.base), args, strict=False)), **kwargs}
        if site.spot is not None and site.spot.residual:
            if site.tap.value is None:
                raise RuntimeError(
                    f"{site.name}: {site.spot.residual} did not run before it in this call, so the residual stream that "
                    "the adapter needs is not known; name another place in target_modules"
                )
            inputs[site.spot.residual], site.tap.value = site.tap.value, None  # kept no longer than needed
        first, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        first = along(links, inputs, first)
        return (first, *rest) if isinstance(outputs, tuple) else first


def along(links: Links, inputs: dict[str, Any], y: Tensor) -> Tensor:
    """The module's output after `links`."""
    for link in links:
        if isinstance(link, Fork):  # f + sum_i w_i (f_i - f)
            start = y
            for share, branch in link.branches:
                y = y + share * (along(branch, inputs, start) - start)
        elif link.post is not None:
            y = link.post(inputs, y)
    return y


def arguments(base: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    found = _ARGUMENTS.get(base)
    if found is None:
        found = _ARGUMENTS[base] = tuple(inspect.signature(base.forward).parameters)[1:]
    return found


_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {}
