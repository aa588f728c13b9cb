"""Whole modules, such as an attention or a block's output, whose output an adapter maps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..algebra.recursion import Post, Semantics, Terms, evaluate
from .geometry import Geometry, Weight
from .kind import LayerKind
from .shallow_copy import rows_of_adapter, select_rows


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

    def map_outputs(
        self, site: Weight, base: type[nn.Module], outputs: Any, terms: Terms, args: Any, kwargs: Any
    ) -> Any:
        """The module's outputs with the terms of the active adapters."""
        inputs = self.inputs(site, base, args, kwargs)
        return with_first(outputs, map_output(terms, inputs, first_of(outputs)))

    def by_rows(
        self,
        site: Weight,
        base: type[nn.Module],
        outputs: object,
        parts: Sequence[tuple[Terms, Sequence[int]]],
        count: int,
        args: object,
        kwargs: dict[str, Any],
    ) -> Any:
        """A module's outputs with the terms of each adapter on its own rows.

        Args:
            site: the module's.
            base: the module's own class.
            outputs: what the module put out for the whole batch.
            parts: terms and the numbers of their rows, of which no two share any.
            count: rows of the batch.
            args: of the module.
            kwargs: of the module.

        Raises:
            ValueError: the module does not put out the rows of the batch one by one.
        """
        inputs = self.inputs(site, base, args, kwargs)
        first = first_of(outputs)
        if not isinstance(first, Tensor) or first.shape[0] % count:
            raise ValueError(
                f"{site.name}: adapter_names cannot be told apart by row here, because {base.__name__} does not put "
                "out the rows of the batch one by one; run the rows of one adapter at a time"
            )
        y = first
        for terms, rows in parts:
            own = rows_of_adapter(rows, count, first)
            mapped = map_output(
                terms, {k: select_rows(v, own, first) for k, v in inputs.items()}, first.index_select(0, own)
            )
            y = y.index_copy(0, own, mapped.to(y.dtype))
        return with_first(outputs, y)

    def inputs(self, site: Weight, base: type[nn.Module], args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The module's arguments by name, with the residual stream at the site."""
        inputs = {**dict(zip(argument_names(base), args, strict=False)), **kwargs}
        if site.spot is not None and site.spot.residual:
            if site.tap.value is None:
                raise RuntimeError(
                    f"{site.name}: {site.spot.residual} did not run before it in this call, so the residual stream that "
                    "the adapter needs is not known; name another place in target_modules"
                )
            inputs[site.spot.residual], site.tap.value = site.tap.value, None  # kept no longer than needed
        return inputs


def first_of(outputs: object) -> Any:
    """The first of a module's outputs."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def with_first(outputs: object, first: Tensor) -> Any:
    """A module's outputs with another first one."""
    return (first, *outputs[1:]) if isinstance(outputs, tuple) else first


class OutputSemantics(Semantics[dict[str, Any], Tensor]):
    """Terms as maps of a module's first output, given its arguments by name."""

    def post(self, function: Post, x: dict[str, Any], y: Tensor) -> Tensor:
        return function(x, y)

    def mix(self, y: Tensor, share: float, branch: Tensor, start: Tensor) -> Tensor:
        return y + share * (branch - start)


def map_output(terms: Terms, inputs: dict[str, Any], y: Tensor) -> Tensor:
    """The module's first output after `terms`."""
    return evaluate(terms, OutputSemantics(), inputs, lambda _: y)


def argument_names(base: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional arguments of a module's forward."""
    found = _ARGUMENTS.get(base)
    if found is None:
        found = _ARGUMENTS[base] = tuple(inspect.signature(base.forward).parameters)[1:]
    return found


_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {}
