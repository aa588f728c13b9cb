"""Config fields that several methods have, each written once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from ..layers.site import Site
from ..targets.query import Names, as_names
from .hooks import Tensors


@dataclass(kw_only=True)
class SavedModules:
    """Modules trained whole beside the adapter.

    Args:
        modules_to_save: modules trained as full copies and saved with the adapter.
    """

    modules_to_save: list[str] | None = None


@dataclass(kw_only=True)
class TargetFields(SavedModules):
    """Which modules a method adapts.

    Args:
        target_modules: names (suffixes), a regular expression, or "all-linear"; None for the architecture's default.
        exclude_modules: names or a regular expression to leave out.
    """

    target_modules: Names = None
    exclude_modules: Names = None

    def normalize(self) -> None:
        self.target_modules = as_names(self.target_modules)
        self.exclude_modules = as_names(self.exclude_modules)


@dataclass(kw_only=True)
class LayerFields(TargetFields):
    """Which layers those modules are in.

    Args:
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the list those indices count, such as "layers".
    """

    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


@dataclass(kw_only=True)
class PatternFields:
    """Ranks and scales that differ between modules.

    Args:
        rank_pattern: module name or regular expression -> r there.
        alpha_pattern: module name or regular expression -> alpha there.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class TransposedField:
    """How peft's files say that a layer stores its weight transposed.

    Args:
        fan_in_fan_out: accepted for peft's files; the layer kind knows how its weight is stored.
    """

    fan_in_fan_out: bool = False


@dataclass(kw_only=True)
class BiasField:
    """Which biases are trained.

    Args:
        bias: "none", "<method>_only" (train the biases of adapted layers) or "all" (train every bias).
    """

    bias: str = "none"

    def init_bias(self, site: Site) -> dict[str, Tensor]:
        """A trained copy (out,) of the layer's bias, if `bias` asks for one."""
        own = site.bias
        packed = site.kind.bias != "bias"  # an attention's packed bias, which peft does not train either
        if own is None or packed or self.bias == "none":
            return {}
        return {"bias": site.computed(tuple(own.shape), lambda: own)}

    def bias_shift(self, p: Tensors, site: Site) -> Tensor | None:
        """The change (out,) of the output that a trained bias makes."""
        return bias_shift(p, site)


def bias_shift(p: Tensors, site: Site) -> Tensor | None:
    """The change (out,) of the output that the trained copy `p["bias"]` of a layer's bias makes."""
    own = site.bias
    if own is None or "bias" not in p:
        return None
    return p["bias"] - own.to(device=p["bias"].device, dtype=p["bias"].dtype)


def union_of(field_name: str, values: Collection[Names]) -> set[str] | str | None:
    """What a field means for several configs together: names, or one regular expression for all of them.

    Raises:
        ValueError: names for some configs and a regular expression for others.
    """
    if all(v is None for v in values):
        return None
    patterns = [v for v in values if isinstance(v, str)]
    if not patterns:
        return {name for v in values for name in v or ()}  # attached adapters may have no targets of their own
    if len(patterns) == len(values):
        return "|".join(f"({v})" for v in dict.fromkeys(patterns)) if len(set(patterns)) > 1 else patterns[0]
    raise ValueError(
        f"{field_name} is a regular expression for some of these adapters and a list for others ({list(values)!r}); "
        "adapters can be combined if it is the same for all"
    )


def require_same(field_name: str, values: Collection[object]) -> None:
    """Raise ValueError if a field is not the same for all of several configs."""
    first, *others = values
    for other in others:
        if other != first:
            raise ValueError(
                f"adapters can be combined if {field_name} is the same for all; here it is {first!r} and {other!r}"
            )
