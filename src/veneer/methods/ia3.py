"""(IA)^3: learned vectors that rescale activations.

References:
    Liu et al. 2022, arxiv.org/abs/2205.05638
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from ..algebra.operator import Operator
from ..algebra.operators import Diagonal
from ..layers.site import Site
from ..targets.defaults import default_feedforward, model_type
from ..targets.query import Names, as_names
from ..targets.select import matches
from .base import Method
from .fields import TargetFields, TransposedField, union_of
from .hooks import Tensors
from .registry import method
from .tensors import Trained


@method("IA3")
@dataclass
class IA3Config(TargetFields, TransposedField, Method):
    """(IA)^3. Liu et al. 2022, arxiv.org/abs/2205.05638, section 3.3:  y = l * (W x + b), or W (l * x)

    Args:
        feedforward_modules: those of the targets whose input is rescaled instead of their output; None for the
            architecture's default.
        init_ia3_weights: True starts at ones, False at random.
    """

    feedforward_modules: Names = None
    init_ia3_weights: bool = True

    tensors = {"l": Trained("ia3_l", axes=lambda config, site: ("", "in") if config.on_input(site) else ("out", ""))}
    recipe = {"learning_rate": 3e-2, "warmup": 10}

    def normalize(self) -> None:
        super().normalize()
        self.feedforward_modules = as_names(self.feedforward_modules)

    def prepare(self, model: nn.Module) -> Self:
        targets, inner = self.target_modules, self.feedforward_modules
        if inner is not None:
            both = isinstance(inner, set) and isinstance(targets, set)
            if both and (lost := sorted(set(inner).difference(targets or ()))) and not self.from_file:
                raise ValueError(
                    f"IA3Config: feedforward_modules names {lost}, which are not in "
                    f"target_modules={sorted(targets or ())!r}; it says which of the targets are rescaled at their input"
                )
            return self
        found = default_feedforward(model_type(model))
        if found is None:
            raise ValueError(
                f"IA3Config(feedforward_modules=None): there is no default for model type {model_type(model)!r}; name the "
                "targets whose input is rescaled, or [] to rescale outputs only"
            )
        chosen = set(found)
        if isinstance(targets, set) and not any(d.endswith(t) for d in chosen - targets for t in targets):
            chosen = {
                t for t in targets if t.endswith(tuple(chosen))
            }  # peft reads no more than a subset of the targets
        return self.replace(feedforward_modules=chosen)

    def on_input(self, site: Site) -> bool:
        inner = self.feedforward_modules
        if isinstance(inner, str):
            return matches(site.name, inner)
        return site.name.endswith(tuple(inner or ()))  # by the letters, as peft: "o" means "wo" too

    def combined(self, others: Sequence[Self], **options: object) -> Self:
        inner = union_of("feedforward_modules", [c.feedforward_modules for c in (self, *others)])
        return super().combined(others, **options).replace(feedforward_modules=inner)

    def combine(self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site) -> dict[str, Tensor]:
        """The weighted sum of the vectors, l = w_1 l_1 + w_2 l_2 + ...; an adapter that is not here counts for nothing."""
        vectors = [p["l"] for _, p in parts]
        if len({v.shape for v in vectors}) > 1:
            raise ValueError(
                f"{site.name}: some of these adapters rescale its input and others its output, so their vectors cannot "
                "be added; combine adapters with the same feedforward_modules"
            )
        total = vectors[0] * weights[0]
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            total = total + vector * weight
        return {"l": total}

    def init(self, site: Site) -> dict[str, Tensor]:
        n = site.fan_in if self.on_input(site) else site.fan_out
        if site.kernel:
            shape: tuple[int, ...] = (1, n, *(1,) * len(site.kernel))  # (1, n, 1...)
        else:
            shape = (1, n) if self.on_input(site) else (n, 1)
        return {"l": site.ones(*shape) if self.init_ia3_weights else site.normal(*shape)}

    def right(self, p: Tensors, site: Site) -> Operator | None:
        return Diagonal(p["l"].flatten()) if self.on_input(site) else None

    def left(self, p: Tensors, site: Site) -> Operator | None:
        return None if self.on_input(site) else Diagonal(p["l"].flatten())
