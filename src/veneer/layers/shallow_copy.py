"""Shallow copies of modules for one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def rows_of_adapter(rows: Sequence[int], count: int, x: Tensor) -> Tensor:
    """Where x (batch, ...) has some of `count` rows; `generate` repeats each row for its beams."""
    repeat = x.shape[0] // count
    return torch.tensor([i * repeat + k for i in rows for k in range(repeat)], device=x.device)


def select_rows(value: Any, own: Tensor, x: Tensor) -> Any:
    """Some rows of an argument that has as many as x; any other as it is."""
    whole = isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]
    return value.index_select(0, own) if whole else value


def shallow_copy(module: nn.Module, **attributes: Any) -> nn.Module:
    """A shallow double of `module`, of its base class, whose parameters can be set without touching it.

    It lives for one call, so several threads can use the module at once.
    """
    base = getattr(type(module), "_veneer_base", type(module))
    double: nn.Module = object.__new__(base)
    state = dict(module.__dict__)
    for name in ("forward", "_old_forward", "_hf_hook", "_veneer"):
        state.pop(name, None)
    state["_parameters"] = dict(state["_parameters"])
    state["_modules"] = dict(state["_modules"])
    state.update(attributes)
    double.__dict__.update(state)
    return double
