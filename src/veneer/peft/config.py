"""peft.config, and the values of some of its fields."""

from __future__ import annotations

from enum import Enum

from ..methods.base import Method, PeftConfig
from ..methods.base import PeftConfig as PeftConfigMixin

__all__ = [
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftConfigMixin",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningInit",
]


class PromptTuningInit(str, Enum):
    """How virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(str, Enum):
    """How the shared prompt of several tasks starts."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, Enum):
    """The network that makes virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


class _Prompts(type):
    def __instancecheck__(cls, config: object) -> bool:
        return isinstance(config, Method) and bool(config.virtual_tokens)

    def __subclasscheck__(cls, config: type) -> bool:
        return issubclass(config, Method) and config.acts_on == "stacks"


class PromptLearningConfig(metaclass=_Prompts):
    """Any config of virtual tokens, as `isinstance` sees it."""
