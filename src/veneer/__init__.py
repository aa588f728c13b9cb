"""Veneer: fine-tune large pretrained models by training a thin layer on frozen weights.

Public names are peft's. Importing the package imports torch and nothing heavy; names are resolved on use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "veneer.method": ("PeftType", "TaskType"),
    "veneer.model": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
        "PeftModel",
        "get_layer_status",
        "get_model_status",
        "get_peft_model",
        "inject_adapter_in_model",
    ),
    "veneer.codec": ("get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"),
    "veneer.runtime": ("AdapterLoadError",),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names} | {"PeftConfig": "veneer.method"}


def _configs() -> dict[str, type]:
    """Config classes of the registered methods, by class name."""
    registry = importlib.import_module("veneer.method").METHODS
    return {cls.__name__: cls for cls in registry.values()}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home = importlib.import_module(_NAMES[name])
        found = getattr(home, "Method" if name == "PeftConfig" else name)
    elif name.endswith("Config") and name in (configs := _configs()):
        found = configs[name]
    else:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_configs()])
