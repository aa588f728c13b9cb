"""peft.mapping: which class a method's name means."""

from __future__ import annotations

from typing import Any

from ..methods.base import Method
from ..methods.registry import METHODS
from ..model.peft_model import get_peft_model
from .models import inject_adapter_in_model

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[Method]] = dict(METHODS)
PEFT_TYPE_TO_PREFIX_MAPPING = {name: cls.key_prefix for name, cls in METHODS.items()}


def get_peft_config(config_dict: dict[str, Any]) -> Method:
    """The config of a dict with a `peft_type`.

    Raises:
        ValueError: a method that Veneer does not have.
    """
    given = dict(config_dict)
    name = str(given.pop("peft_type"))
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"peft_type={name!r}: must be one of {', '.join(PEFT_TYPE_TO_CONFIG_MAPPING)}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[name](**given)


def __getattr__(name: str) -> Any:
    if name in ("PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"):
        from .tuners import tuners_utils

        return dict(tuners_utils.TUNERS)
    raise AttributeError(f"module 'peft.mapping' has no attribute {name!r}")
