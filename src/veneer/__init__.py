"""Veneer: fine-tune large pretrained models by training a thin layer on frozen weights.

Public names are peft's. Importing the package imports torch and nothing heavy; names are resolved on use. `__init__.pyi` has
them for type checkers and editors; `make architecture` writes it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "checks.verify": "verify",
    "export.dense": "DenseReport export_dense",
    "export.to_lora": "convert_to_lora save_as_lora",
    "files.certificate": "Certificate CertificateWarning",
    "files.state_dict": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
    "injection.router": "Average Parallel",
    "interop.trainer": "WatchCallback",
    "io.fingerprint": "BaseMismatchWarning",
    "lifecycle.load_report": "AdapterLoadError",
    "methods.base": "PeftConfig",
    "methods.peft_types": "PeftType TaskType",
    "model.auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification",
    "model.peft_model": "PeftModel get_peft_model inject_adapter_in_model",
    "model.status": "get_layer_status get_model_status",
    "planning": "plan",
    "training.findings": "WatchError WatchWarning",
    "training.kbit": "prepare_model_for_kbit_training",
    "training.penalties": "penalty",
    "training.watch": "watch",
}
_NAMES = {name: f"veneer.{home}" for home, names in _HOMES.items() for name in names.split()}


def _configs() -> dict[str, type]:
    """Config classes of the registered methods, by class name."""
    registry = importlib.import_module("veneer.methods.registry").METHODS
    return {cls.__name__: cls for cls in registry.values()}


def _find_config(name: str) -> Any:
    """The config class of this name, or None. Only its file is imported, as importing every method takes its time."""
    for file in sorted(Path(__file__).with_name("methods").glob("*.py")):
        if f"\nclass {name}(" in file.read_text("utf-8"):
            return getattr(importlib.import_module(f"veneer.methods.{file.stem}"), name)
    return None


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home = importlib.import_module(_NAMES[name])
        found = getattr(home, name)
    elif name == "__all__":
        found = sorted([*_NAMES, *_configs()])
    elif name.endswith("Config") and (found := _find_config(name)) is not None:
        pass
    else:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_configs()])
