"""Faster ways to do what the operators say. Each takes a (layer kind, operator) pair, may decline, and must match the
operator's own `apply` in outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_ENABLED = True


def enabled() -> bool:
    """Whether kernels may take calls."""
    return _ENABLED


@contextmanager
def reference() -> Iterator[None]:
    """Within the block, in every thread, the operators' own `apply` runs and no kernel does."""
    global _ENABLED
    before, _ENABLED = _ENABLED, False
    try:
        yield
    finally:
        _ENABLED = before
