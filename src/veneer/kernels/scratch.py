"""Memory that a kernel writes before it reads, kept from call to call.

On a CPU a large tensor that is made anew comes as pages that the operating system has yet to map, which costs several
times what writing it costs. Nothing in scratch memory outlives the call that asked for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**20  # bytes that stay in a core's cache
LIMIT = 2**26  # bytes; what is larger is made anew, so that little is held between steps


class _Held(threading.local):
    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}  # name -> bytes
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}  # the last ones asked for


_HELD = _Held()


def take_buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with any content. The one that was taken before under the same name in this thread is void."""
    key = (name, shape, dtype)
    if device.type == "cpu" and key in _HELD.views:
        return _HELD.views[key]
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size > LIMIT or torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    block = _HELD.blocks.get(name)
    if block is None or block.numel() < size or len(_HELD.views) > 64:
        _HELD.views.clear()  # a view would keep an old block alive
        block = _HELD.blocks[name] = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    view = _HELD.views[key] = block[:size].view(dtype).view(shape)
    return view


def buffer_like(name: str, x: Tensor) -> Tensor:
    """As `take`, for the shape, dtype and device of x."""
    return take_buffer(name, tuple(x.shape), x.dtype, x.device)


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Runs of the rows of x (rows, columns) that fit a cache; all of them where x is not on a CPU."""
    rows = x.shape[0]
    step = max(16, CHUNK // (x.shape[1] * x.element_size())) if x.device.type in ("cpu", "meta") else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)
