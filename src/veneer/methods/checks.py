"""Range checks of hyper-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Method


def check_positive(config: Method, **values: float) -> None:
    """Raise ValueError naming the first of `values` that is not above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{type(config).__name__}({name}={value!r}): must be a number above 0")


def check_positive_int(config: Method, **values: int) -> None:
    """Raise ValueError naming the first of `values` that is not a positive whole number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{type(config).__name__}({name}={value!r}): must be a whole number, 1 or more")


def check_probability(config: Method, **values: float) -> None:
    """Raise ValueError naming the first of `values` outside [0, 1)."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{type(config).__name__}({name}={value!r}): must be in [0, 1)")


def check_one_of(config: Method, allowed: Sequence[Any], **values: object) -> None:
    """Raise ValueError naming the first of `values` that is not in `allowed`."""
    for name, value in values.items():
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"{type(config).__name__}({name}={value!r}): must be one of {names}")
