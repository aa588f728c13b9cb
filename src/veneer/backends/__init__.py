"""How frozen weights are stored. One file a storage format; the first that matches a weight serves it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backend(ABC):
    """Reads and writes one storage format of a weight, in the layout in which its layer uses it."""

    name: str

    @abstractmethod
    def matches(self, owner: nn.Module, param: str) -> bool:
        """Whether the weight is stored in this format. Must not import the format's library."""

    @abstractmethod
    def read(self, owner: nn.Module, param: str) -> Tensor:
        """The weight as a floating-point tensor, without a copy where that is possible."""

    @abstractmethod
    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        """Store `value` as the weight and return a token, not None, with which `restore` brings back the exact bits."""

    @abstractmethod
    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        """Undo a `write`."""


def backend_of(owner: nn.Module, param: str, name: str) -> Backend:
    """Return the backend of the weight `param` of `owner`.

    Raises:
        TypeError: no backend reads the weight; `name` says where.
    """
    from .plain import Plain

    for backend in (Plain(),):
        if backend.matches(owner, param):
            return backend
    weight = owner._parameters.get(param)
    stored = "nothing" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
    raise TypeError(
        f"{name}: no weight backend reads {type(owner).__name__}.{param} (it holds {stored}); "
        "allowed are float32, float64, bfloat16 and float16 parameters; load the base model unquantized"
    )
