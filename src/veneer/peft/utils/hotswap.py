"""peft.utils.hotswap."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...files.adapter_files import runtime_on
from ...lifecycle.keys import PREFIX
from ...methods.base import Method
from ...methods.lora import LoraConfig
from ...serving.hotswap import ALIKE, is_compiled, swap_values, unwrap_key
from ...serving.hotswap import hotswap_adapter as hotswap_adapter
from ...serving.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap


def check_hotswap_configs_compatible(config0: Method, config1: Method) -> None:
    """Raise ValueError unless an adapter with one config can be swapped for one with the other, in place."""
    for config in (config0, config1):
        if not isinstance(config, LoraConfig):
            raise ValueError(f"{type(config).__name__}: only LoRA can be swapped in place")
    for field in ALIKE:
        if getattr(config0, field) != getattr(config1, field):
            raise ValueError(
                f"{field} is {getattr(config0, field)!r} in one config and {getattr(config1, field)!r} in the other; a swap "
                "cannot change it: delete the adapter and load the other one"
            )


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: Method,
    parameter_prefix: str = "lora_",
    **options: object,
) -> None:
    """Copy tensors, named as in `model.state_dict()` of peft, into a live LoRA; see `hotswap_adapter`."""
    plain = {k.replace(f".{adapter_name}.", ".").removesuffix(f".{adapter_name}"): v for k, v in state_dict.items()}
    tensors = {k if k.startswith(PREFIX) else f"{PREFIX}{k}": v for k, v in plain.items()}
    swap_values(runtime_on(unwrap_key(model)), adapter_name, config, tensors, compiled=is_compiled(model))
