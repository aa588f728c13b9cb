"""peft's errors and warnings."""

from __future__ import annotations


class PeftError(Exception):
    """The base of peft's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """Targets that the model does not have. Veneer raises ValueError for them."""


class PeftWarning(UserWarning):
    """peft's own warnings."""
