"""The stand-in for peft: its public names, for scripts that are not rewritten; may import model and everything below it.

    python -m veneer.peft script.py     runs a script so
    veneer.peft.enable()                does it from within, before anything imports peft

Off unless asked for. Names of methods that Veneer does not have yet are there, and raise when they are used.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from .standin import VERSION as VERSION
from .standin import disable as disable
from .standin import enable as enable
from .standin import enabled as enabled

__version__ = VERSION
__all__ = Path(__file__).with_name("names.txt").read_text("utf-8").split()  # noqa: PLE0605

_HOMES = {
    "veneer.peft.models": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PeftMixedModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "inject_adapter_in_model",
        "set_peft_model_state_dict",
    ),
    "veneer.peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
    ),
    "veneer.peft.utils.other": ("cast_mixed_precision_params", "shift_tokens_right"),
    "veneer.peft.config": (
        "MultitaskPromptTuningInit",
        "PromptEncoderReparameterizationType",
        "PromptLearningConfig",
        "PromptTuningInit",
    ),
    "veneer.peft.errors": ("NoMatchingPeftModuleError", "PeftError", "PeftWarning"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _NAMES.get(name)
    if home is not None:
        return getattr(importlib.import_module(home), name)
    import veneer

    if name not in __all__:
        raise AttributeError(f"module 'peft' has no attribute {name!r}")
    if name in tuner_models():
        return tuner_models()[name]
    return getattr(veneer, name) if name in available_names() else not_yet(name)


def __dir__() -> list[str]:
    return [*__all__, "disable", "enable", "enabled"]


def tuner_models() -> dict[str, Any]:
    """`LoraModel` and its like, one for each method that adapts layers or modules."""
    found: dict[str, Any] = importlib.import_module("veneer.peft.tuners.tuners_utils").MODELS
    return found


@cache
def available_names() -> frozenset[str]:
    """Those of peft's public names that work."""
    import veneer

    return frozenset(n for n in __all__ if n in _NAMES or n in tuner_models() or hasattr(veneer, n))


@cache
def not_yet(name: str) -> type:
    """What stands for a name of peft's that Veneer does not have: it can be imported, and used for nothing."""

    def refuse(*args: object, **kwargs: object) -> Any:
        raise NotImplementedError(
            f"peft.{name} is not in Veneer yet; it has {', '.join(sorted(n for n in available_names() if n.endswith('Config')))}; "
            "see: python -m veneer.peft --check"
        )

    return type(name, (), {"__new__": refuse, "__module__": "peft", "from_pretrained": classmethod(refuse)})
