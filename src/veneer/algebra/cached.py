"""A value computed from a tensor and kept until the tensor changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

LOOKED_AT = 8  # elements of a tensor in host memory that are compared


class Mark:
    """What a tensor was when a value was computed from it. Keeps neither the tensor nor its memory alive.

    The object, its storage (`.data = ...`, a device move), its layout and its version (in-place operations) are
    compared. Writes that torch does not count, through `.data` or a raw pointer, show only in host memory, by a few
    elements.
    """

    __slots__ = ("layout", "some", "storage", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.storage = storage_of(tensor)
        self.layout = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        self.version = tensor._version
        self.some = first_markable(tensor)

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the one that was marked, unchanged."""
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.storage == storage_of(tensor)
            and self.layout == (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            and self.some == first_markable(tensor)
        )


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """A tensor's storage as such: an address alone could be that of a later one."""
    return StorageWeakRef(tensor.untyped_storage())


def first_markable(tensor: Tensor) -> list[float]:
    """A few elements of a tensor in host memory; elsewhere looking would make the host wait."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return []
    found: list[float] = tensor.detach().view(-1)[:: max(1, tensor.numel() // LOOKED_AT)].tolist()
    return found


def is_markable(tensor: Tensor) -> bool:
    """Whether changes of a tensor can be seen: a plain one with memory and a version of its own."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and not tensor.is_inference()
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Kept:
    """One value computed from one tensor. Copies and pickles of it start empty; threads may use it at once."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: tuple[Mark, Tensor] | None = None  # replaced as a whole

    def get(self, source: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what it returned last time if `source` has not changed since.

        In a compiled graph it is always computed: a cached value would become a constant of the graph.
        """
        if torch.compiler.is_compiling() or not is_markable(source):
            return make()
        held = self.held
        if held is not None and held[0].fits(source):
            return held[1]
        mark = Mark(source)  # before the value, so that a change while it is computed is seen
        value = make()
        if is_markable(value):
            self.held = (mark, value)
        return value

    def __reduce__(self) -> Any:
        return Kept, ()
