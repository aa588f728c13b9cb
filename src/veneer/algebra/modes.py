"""Whether kernels may take a call in the active torch modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_ENABLED = True
_SHAPES = False


def kernels_enabled() -> bool:
    """Whether kernels may take calls."""
    return _ENABLED


def functions_ready() -> bool:
    """Whether custom autograd Functions are valid under the active modes (functorch, forward AD, tracing)."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._get_tracing_state():
        return False
    return not (torch._C._len_torch_dispatch_stack() and keeps_results())


def keeps_results() -> bool:
    """Whether selective checkpointing caches results of operations, which in-place kernels would overwrite."""
    modes = _get_current_dispatch_mode_stack()
    return any(type(m).__name__ in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode") for m in modes)


@contextmanager
def reference_only() -> Iterator[None]:
    """Within the block, in every thread, the operators' own `apply` runs and no kernel does."""
    global _ENABLED
    before, _ENABLED = _ENABLED, False
    try:
        yield
    finally:
        _ENABLED = before


def shapes_only_enabled() -> bool:
    """Whether kernels take tensors of the meta device, to count the memory of a step."""
    return _SHAPES


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within the block kernels run on the meta device too; by default the operators' own `apply` does."""
    global _SHAPES
    before, _SHAPES = _SHAPES, True
    try:
        yield
    finally:
        _SHAPES = before
