"""BitFit: the biases of a model trained, and nothing else.

References:
    Ben Zaken et al. 2021, arxiv.org/abs/2106.10199
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ..targets.select import resolve_targets
from .base import OtherSublayers
from .fields import TargetFields
from .full_copy import TrainedBias
from .registry import method


@method("BITFIT")
@dataclass
class BitFitConfig(TargetFields, TrainedBias):
    """BitFit. Ben Zaken et al. 2021, arxiv.org/abs/2106.10199, section 3:  y = W x + b', with b' a trained copy of b

    Args:
        target_modules: modules whose biases are trained: names (suffixes) or a regular expression; None for every
            bias of the model.
    """

    recipe = {"learning_rate": 3e-3, "warmup": 10}

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str]:
        owners = {n: b for n, m in model.named_modules() if ":" not in n and (b := bias_names(m))}
        if not owners:
            raise ValueError(f"BitFitConfig: {type(model).__name__} has no bias to train; use another method")
        every = self if self.target_modules is not None else self.replace(target_modules=set(owners))
        chosen = resolve_targets(
            model,
            every.target_query(),
            supported=lambda m: bool(bias_names(m)),
            allowed="modules with a bias of their own",
        )
        return [f"{n}.{b}" if n else b for n in chosen.modules for b in owners[n]]


def bias_names(module: nn.Module) -> list[str]:
    """Names of the biases that a module holds itself: `bias`, and packed or stacked ones (`in_proj_bias`)."""
    return [
        n for n, p in module._parameters.items()
        if p is not None and ":" not in n and (n == "bias" or n.endswith("_bias"))
    ]  # fmt: skip
