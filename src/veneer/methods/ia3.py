"""(IA)^3: learned vectors that rescale activations.

References:
    Liu et al. 2022, arxiv.org/abs/2205.05638
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..method import Method, Site, Tensors, default_feedforward, matches, method, model_type
from ..operators import Diagonal, Operator


@method("IA3")
@dataclass
class IA3Config(Method):
    """(IA)^3. Liu et al. 2022, arxiv.org/abs/2205.05638, section 3.3:  y = l * (W x + b), or W (l * x)

    Args:
        target_modules: names (suffixes), a regular expression, or "all-linear"; None for the architecture's default.
        exclude_modules: names or a regular expression to leave out.
        feedforward_modules: those of the targets whose input is rescaled instead of their output; None for the
            architecture's default.
        fan_in_fan_out: accepted for peft's files; the layer kind knows how its weight is stored.
        modules_to_save: modules trained as full copies and saved with the adapter.
        init_ia3_weights: True starts at ones, False at random.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    feedforward_modules: Any = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    names = {"l": "ia3_l"}
    recipe = {"learning_rate": 3e-2, "warmup": 10}

    def prepare(self, model: nn.Module) -> Method:
        if self.feedforward_modules is not None:
            return self
        found = default_feedforward(model_type(model))
        if found is None:
            raise ValueError(
                f"IA3Config(feedforward_modules=None): there is no default for model type {model_type(model)!r}; name the "
                "targets whose input is rescaled, or [] to rescale outputs only"
            )
        changed: Method = self.replace(feedforward_modules=set(found))
        return changed

    def on_input(self, site: Site) -> bool:
        return matches(site.name, self.feedforward_modules)

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
