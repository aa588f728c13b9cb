"""peft.utils.integrations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...backends import backend_of
from ...distributed import sharding


@contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> Iterator[None]:
    """Within the block, parameters that ZeRO-3 partitioned are whole."""
    given = [param] if isinstance(param, Tensor) else list(param)
    with sharding.gathered_in_place(given, change=modifier_rank is not None):
        yield


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within the block, new modules are on the meta device."""
    with torch.device("meta"):
        yield


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """A layer's weight as it is evaluated, (out, in)."""
    return backend_of(module, "weight", type(module).__name__).read(module, "weight")
