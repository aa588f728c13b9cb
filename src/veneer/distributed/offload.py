"""accelerate's dispatch: layers whose weights live on the CPU or on disk between forwards.

Such a layer carries `_hf_hook`; with `offload` on, its weights are on the meta device and a `weights_map`
brings the values. Adapter tensors stay resident on the hook's execution device: around every forward they
are taken out of the hook's sight, so that it neither offloads them nor swaps the Parameter objects that an
optimizer holds.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


def hook_of(module: nn.Module) -> DispatchHook | None:
    """The innermost dispatch hook of a module that offloads, or None."""
    hook = module.__dict__.get("_hf_hook")
    while isinstance(hook, Resident):
        hook = hook.inner
    for candidate in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook
        if getattr(candidate, "offload", False) and getattr(candidate, "weights_map", None) is not None:
            return candidate
    return None


def fetch_offloaded(module: nn.Module, param: str) -> Tensor | None:
    """The value of an offloaded parameter, or None if it is not offloaded."""
    hook = hook_of(module)
    if hook is None:
        return None
    value: Tensor = hook.weights_map[param]
    return value


def store_offloaded(module: nn.Module, param: str, value: Tensor) -> None:
    """Replace the value of an offloaded parameter, in host memory."""
    hook = hook_of(module)
    assert hook is not None
    weights, key = hook.weights_map, param
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):  # PrefixedDataset
        key, weights = weights.prefix + key, weights.dataset
    if isinstance(weights, dict):
        weights[key] = value
    else:  # OffloadedWeightsLoader: its state dict takes precedence over its files
        weights.state_dict[key] = value
        if key not in weights.all_keys:
            weights.all_keys.append(key)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which an offloaded layer computes, or None if it is not offloaded."""
    hook = hook_of(module)
    device = getattr(hook, "execution_device", None)
    return None if device is None else torch.device(device if not isinstance(device, int) else f"cuda:{device}")


class DispatchHook(Protocol):
    """accelerate's AlignDevicesHook, by the attributes that are read here."""

    offload: bool
    weights_map: Any
    execution_device: int | str | torch.device | None


class Resident:
    """Wraps a dispatch hook so that it sees only the base layer's own tensors.

    It has accelerate's ModelHook interface without importing accelerate.
    """

    no_grad = False

    def __init__(self, inner: DispatchHook) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _hidden(self, module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        params = {k: module._parameters.pop(k) for k in list(module._parameters) if ":" in k}
        buffers = {k: module._buffers.pop(k) for k in list(module._buffers) if ":" in k}
        return params, buffers

    def _around(self, what: str, module: nn.Module, *args: object, **kwargs: object) -> Any:
        params, buffers = self._hidden(module)
        try:
            return getattr(self.inner, what)(module, *args, **kwargs)
        finally:
            module._parameters.update(params)
            module._buffers.update(buffers)

    def init_hook(self, module: nn.Module) -> Any:
        return self._around("init_hook", module)

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        return self._around("pre_forward", module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: object) -> Any:
        return self._around("post_forward", module, output)

    def detach_hook(self, module: nn.Module) -> Any:
        return self._around("detach_hook", module)


def refuse_training(module: nn.Module) -> None:
    """Raise RuntimeError if a layer was dispatched after it was adapted and is now to be trained.

    Its hook then offloads the adapter with the layer and makes new Parameters on every forward.
    """
    if isinstance(module.__dict__["_hf_hook"], Resident) or hook_of(module) is None or not torch.is_grad_enabled():
        return
    if any(":" in name and p is not None and p.requires_grad for name, p in module._parameters.items()):
        raise RuntimeError(
            f"{type(module).__name__}: the model was dispatched with offloading after the adapter was attached, so the "
            "optimizer's parameters would get no gradient; dispatch the base model first, then attach the adapter"
        )


def keep_resident(module: nn.Module) -> None:
    """Hide the module's adapter tensors from its offloading hook. Safe to call again."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None and not isinstance(hook, Resident) and hook_of(module) is not None:
        module.__dict__["_hf_hook"] = Resident(hook)


def release_residents(module: nn.Module) -> None:
    """Undo `keep_resident`."""
    hook = module.__dict__.get("_hf_hook")
    if isinstance(hook, Resident):
        module.__dict__["_hf_hook"] = hook.inner
