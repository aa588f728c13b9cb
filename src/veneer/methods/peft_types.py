"""Names of methods and tasks, as they stand in `adapter_config.json`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from ..targets.suggest import suggest

PUBLIC: dict[str, None] = {}  # names of the methods that a user can name, in order of registration


@functools.cache
def import_methods() -> None:
    """Import every file of this folder, which registers the methods that they define."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{found.name}")


class TaskType(StrEnum):
    """What the adapted model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Heads that are new, and therefore saved with the adapter, for a task.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class _PeftTypes(type):
    def __getattr__(cls, name: str) -> PeftType:
        if not name.startswith("_") and name in cls.members():
            return PeftType(name)
        raise AttributeError(f"PeftType has no member {name!r}{suggest(name, cls.members())}")

    def __iter__(cls) -> Iterator[PeftType]:
        return map(PeftType, cls.members())

    def members(cls) -> list[str]:
        """Names of the methods that a user can name."""
        import_methods()
        return list(PUBLIC)


class PeftType(str, metaclass=_PeftTypes):
    """The method a config belongs to, as written to `adapter_config.json`. Members follow the registry."""

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)
