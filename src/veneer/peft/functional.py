"""peft.functional: operations on a model that has adapters in it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..files.adapter_files import runtime_on
from ..files.state_dict import get_peft_model_state_dict as get_peft_model_state_dict
from ..lifecycle import detach
from .models import inject_adapter_in_model as inject_adapter_in_model
from .models import set_peft_model_state_dict as set_peft_model_state_dict
from .utils.other import cast_adapter_dtype as cast_adapter_dtype


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: object = None) -> list[str]:
    """Delete an adapter; returns which are active then."""
    runtime = runtime_on(model)
    if adapter_name in runtime.configs:
        detach.delete_adapter(runtime, adapter_name)
    return list(runtime.router.active)


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: object = None
) -> list[str]:
    """Activate adapters, whose parameters are trained then, and no others."""
    runtime = runtime_on(model)
    runtime.activate(adapter_name)
    for name in runtime.configs:
        for p in runtime.parameters(name):
            p.requires_grad_(name in runtime.router.active and not inference_mode)
    return list(runtime.router.active)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Say whether adapters are trained."""
    runtime = runtime_on(model)
    for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
        for p in runtime.parameters(name):
            p.requires_grad_(requires_grad)
