"""Default targets by model type, and per-module values."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .regex import compile_pattern

T = TypeVar("T")


def model_type(model: nn.Module) -> str | None:
    """The architecture, as `model.config.model_type` (or the dict `model.config`) says it, or None."""
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return None if found is None else str(found)


@functools.cache
def defaults() -> dict[str, Any]:
    """The content of defaults.toml, as it stands there."""
    import tomllib

    with open(Path(__file__).with_name("defaults.toml"), "rb") as file:
        return tomllib.load(file)


@functools.cache
def defaults_of(table: str, *, more: bool = True) -> dict[str, list[str] | str]:
    """One table of defaults.toml with what it takes over filled in; `more`: with the entries that peft lacks."""
    own = dict(defaults().get(table, {}))
    like, without = own.pop("like", None), own.pop("without", ())
    base = defaults_of(like, more=more) if like is not None else {}
    extra = defaults()["more"].get(table, {}) if more else {}
    return {k: v for k, v in {**extra, **base}.items() if k not in without} | own


def default_targets(method: str, model_type: str | None, *, more: bool = True) -> list[str] | str | None:
    """Default target_modules of a method (its peft_type) for an architecture, or None.

    Args:
        method: the peft_type; case does not matter.
        model_type: as transformers' configs name it.
        more: whether to count the architectures for which peft has no default.
    """
    table = defaults_of(method.lower(), more=more)
    found = table.get(model_type or "", table.get("*"))
    return list(found) if isinstance(found, list) else found


def default_feedforward(model_type: str | None) -> list[str] | None:
    """Default feedforward_modules of (IA)^3 for an architecture, or None."""
    found = defaults_of("ia3_feedforward").get(model_type or "")
    return list(found) if isinstance(found, list) else None


def pattern_value(patterns: Mapping[str, T], key: str, default: T) -> T:
    """Value of the first pattern that matches a module's name, as a regular expression for its last components.

    Raises:
        ValueError: a bad regular expression.
    """
    for pattern, value in patterns.items():
        if compile_pattern(rf"(.*\.)?({pattern})$", "pattern", pattern).match(key):
            return value
    return default
