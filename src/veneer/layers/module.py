"""Whole modules, such as an attention or a block's output, whose output an adapter maps."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from ..site import Geometry
from .kind import LayerKind

if TYPE_CHECKING:
    from ..site import Link, Site, Takeover


class Module(LayerKind):
    """A module of any arguments; the first of its outputs is what `post` maps."""

    name = "module"
    param = ""

    def matches(self, module: nn.Module) -> bool:
        return False  # named by methods that act on modules

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        return Geometry(0, 0)

    def forward(
        self, site: Site, state: Takeover, target: nn.Module, links: list[Link], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        outputs = state.inner(target, state.router.live(), args, kwargs)
        inputs = {**dict(zip(arguments(state.base), args, strict=False)), **kwargs}
        first, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
        for link in links:
            if link.post is not None:
                first = link.post(inputs, first)
        return (first, *rest) if isinstance(outputs, tuple) else first


def arguments(base: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    found = _ARGUMENTS.get(base)
    if found is None:
        found = _ARGUMENTS[base] = tuple(inspect.signature(base.forward).parameters)[1:]
    return found


_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {}
