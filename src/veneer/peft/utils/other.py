"""peft.utils.other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...files.adapter_files import runtime_on
from ...injection.class_swap import Adapted
from ...training.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from ..layers import entries_at, is_copied
from .constants import CONFIG_NAME as CONFIG_NAME
from .constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from .constants import WEIGHTS_NAME as WEIGHTS_NAME


class _Copied(type):
    rows: bool

    def __instancecheck__(cls, module: Any) -> bool:
        if not cls.rows:
            return is_copied(module)
        return (
            isinstance(module, nn.Module)
            and isinstance(module, Adapted)
            and any(e.method.peft_name == "TRAINABLE_TOKENS" for _, e in entries_at(module).values())
        )


ModulesToSaveWrapper: Any = _Copied("ModulesToSaveWrapper", (), {"rows": False, "__module__": "peft"})
TrainableTokensWrapper: Any = _Copied("TrainableTokensWrapper", (), {"rows": True, "__module__": "peft"})


class _Auxiliary(type):
    def __instancecheck__(cls, module: object) -> bool:
        return isinstance(module, ModulesToSaveWrapper)


class AuxiliaryTrainingWrapper(metaclass=_Auxiliary):
    """A module of which adapters train a copy."""


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """A module's parent, the module, and its name there."""
    parent, _, leaf = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), leaf


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Stop training an adapter."""
    for p in runtime_on(model).parameters(adapter_name):
        p.requires_grad_(False)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Adapter parameters in half precision to float32."""
    if autocast_adapter_dtype:
        for p in runtime_on(model).parameters(adapter_name):
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = p.data.float()


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """What is trained to float32, everything else to `dtype`."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels (batch, tokens) as a decoder's input: one to the right, -100 as padding."""
    shifted = input_ids.roll(1, -1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """FSDP's policy: transformer blocks, named in FSDP_TRANSFORMER_CLS_TO_WRAP or by the model, and what is trained."""
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    said = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    names = [n for n in said.split(",") if n] or list(getattr(model, "_no_split_modules", None) or [])
    classes = {type(m) for m in model.modules() if type(m).__name__ in names}
    missing = [n for n in names if n not in {c.__name__ for c in classes}]
    if missing:
        raise ValueError(f"FSDP_TRANSFORMER_CLS_TO_WRAP={said!r}: the model has no module of class {missing[0]!r}")

    def trained(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return not list(module.children()) and weight is not None and weight.requires_grad

    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=trained),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        ],
    )
