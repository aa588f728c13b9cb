"""Types that annotations need for torch's extension points: autograd contexts and intercepted functions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor

TorchFunction = Callable[..., Any]  # what `__torch_function__` or `__torch_dispatch__` intercepted
TensorTypes = Collection[type]  # the tensor classes among its arguments


class AutogradContext(Protocol):
    """Context of a `torch.autograd.Function`. Forward puts more on it for backward, under names of its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: object) -> None: ...
