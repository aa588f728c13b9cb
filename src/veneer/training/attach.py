"""Attaches an adapter with what its training needs. The watch and the training hooks are imported if they have something to do."""

from __future__ import annotations

from typing import Any

from ..lifecycle.adapters import Runtime
from ..lifecycle.attach import attach_adapter
from ..lifecycle.load_report import LoadReport
from ..methods.base import Method


def attach_watched(
    runtime: Runtime, adapter: str, config: Method, *, trainable: bool = True, **options: Any
) -> LoadReport:
    """Attach an adapter and let its training hooks act; on a quantized base its first backward is checked.

    Arguments and errors are those of `attach_adapter`.
    """
    report = attach_adapter(runtime, adapter, config, trainable=trainable, **options)
    if runtime.configs[adapter].training_hooks:
        from .steps import drive_steps

        drive_steps(runtime, adapter)
    if trainable and any(site.backend is not None and site.backend.packed for site in runtime.places[adapter]):
        from .watch import watch_next_backward  # kernels of packed weights may cut the gradient

        watch_next_backward(runtime.root)
    return report
