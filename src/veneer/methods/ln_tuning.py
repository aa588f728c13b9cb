"""LN tuning: the scales and offsets of a model's normalisation layers, trained as copies.

References:
    Zhao et al. 2023, arxiv.org/abs/2312.11420
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..algebra.operator import Operator
from ..layers import is_supported
from ..layers.site import Site
from ..targets.defaults import default_targets, model_type
from ..targets.select import resolve_targets
from .base import Method, OtherSublayers
from .copies import combine_copies, copy_delta, init_copy
from .fields import TargetFields, bias_shift
from .hooks import Tensors
from .registry import method
from .tensors import Trained

INSIDE = "ln_tuning_layers"  # below a module, where peft keeps its copy


@method("LN_TUNING")
@dataclass
class LNTuningConfig(TargetFields, Method):
    """LN tuning. Zhao et al. 2023, arxiv.org/abs/2312.11420, section 3:  y = g' * norm(x) + b', g' and b' trained

    Any normalisation, whatever its class; and, as in peft, any other module, of which every parameter is then trained.

    Args:
        target_modules: names (suffixes) or a regular expression; None for the architecture's default, or every
            normalisation if it has none.
    """

    recipe = {"learning_rate": 3e-3, "warmup": 10}
    tensors = {"weight": Trained("weight", parameter=""), "bias": Trained("bias")}
    components = (INSIDE,)

    def check(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            raise ValueError(
                'LNTuningConfig(target_modules="all-linear"): this would train every linear layer in full; name '
                "normalisation layers, or use LoraConfig for the linear ones"
            )

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Mapping[str, str]:
        """Site -> its key in the file: layers with an input and output of their own, else single parameters."""
        modules = dict(model.named_modules())
        every = self
        if self.target_modules is None and default_targets(self.peft_name, model_type(model)) is None:
            every = self.replace(target_modules={n for n, m in modules.items() if is_norm(m)})
        chosen = resolve_targets(
            model, every.target_query(), supported=holds_floats, allowed="modules with floating-point parameters"
        ).modules
        found: dict[str, str] = {}
        for name in chosen:
            if outer := next((o for o in chosen if name.startswith(f"{o}.")), None):
                raise ValueError(
                    f"LNTuningConfig: {name!r} is inside {outer!r}, which target_modules names too, so its parameters "
                    "would be trained twice; name one of the two"
                )
            for below, module in modules[name].named_modules(prefix=name):
                deeper = below.removeprefix(name)
                key = f"{name}.{INSIDE}.default{deeper}" if deeper else f"{name}.{INSIDE}"  # as peft's keys come out
                if isinstance(module, nn.MultiheadAttention):
                    raise ValueError(
                        f"LNTuningConfig: {below!r} is an nn.MultiheadAttention, which has no normalisation of its own; "
                        "name the norms beside it, or train it whole with modules_to_save"
                    )
                if is_supported(module):
                    found[below] = key
                else:
                    own = [n for n, p in module._parameters.items() if p is not None and ":" not in n]
                    found |= {f"{below}.{n}": f"{key}.{n}" for n in own}
        return found

    def init(self, site: Site) -> dict[str, Tensor]:
        own = site.bias
        bias = {} if own is None else {"bias": site.computed(tuple(own.shape), lambda: own)}
        return {"weight": init_copy(site), **bias}

    def combine(self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site) -> dict[str, Tensor]:
        """The base's scales and offsets plus the weighted sums of what the adapters change them by."""
        start: dict[str, Any] = {"weight": site.stored(), "bias": site.bias}
        return {k: combine_copies(start[k], [p[k] for _, p in parts], weights) for k in parts[0][1]}

    def delta(self, p: Tensors, site: Site) -> Operator:
        return copy_delta(p["weight"], site)

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        return bias_shift(p, site)


def holds_floats(module: nn.Module) -> bool:
    """Whether a module has parameters, all of them floating-point."""
    own = [p for n, p in module.named_parameters() if ":" not in n]
    return bool(own) and all(p.is_floating_point() for p in own)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by its class's name, which is all that RMS norms have in common."""
    return "Norm" in type(module).__name__ and module._parameters.get("weight") is not None
