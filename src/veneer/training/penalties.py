"""What methods add to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..lifecycle.adapters import runtime_of
from .steps import driver_of


def penalty(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """The penalty that the trained adapters' methods add to the loss, a scalar in float32 at least.

    Nothing has to be done for it to act: its gradient is added before each step of the optimizer. A loop that adds it to its
    loss itself, so that the loss includes it, or as DeepSpeed's ZeRO needs it, calls this once for each step, with gradients
    enabled; it is then not added again.

    Args:
        model: a PeftModel or a model adapted in place.
        adapter_name: which; None for all that are trained.

    Raises:
        ValueError: an unknown adapter, or a model without one.
    """
    runtime = next((found for m in model.modules() if (found := runtime_of(m)) is not None), None)
    if runtime is None:
        raise ValueError(f"{type(model).__name__} has no adapter; call get_peft_model first")
    names = list(runtime.configs) if adapter_name is None else [adapter_name]
    total = torch.zeros(())
    driver = driver_of(runtime)
    for name in names:
        if "penalty" not in runtime.config_of(name).training_hooks:
            continue
        for site in runtime.places[name]:
            method, held = site.entries[name].method, site.tensors(name)
            if "penalty" in method.training_hooks:
                p = {
                    k: sharding.gathered(t) for k, t in held.items()
                }  # the gradient of a gathered one is sharded again
                value = method.penalty(p, site)
                total = total if value is None else total.to(value.device) + value
        if driver is not None and total.requires_grad:
            driver.asked.add(name)
    return total
