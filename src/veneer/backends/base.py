"""The interface of a storage format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


class Backend(ABC):
    """Reads and writes one storage format of a weight, in the layout in which its layer uses it.

    Its library is found by type, through `sys.modules`, and never imported before a weight was found to be of it.
    Biases are plain parameters everywhere, and no backend's but `Plain`'s.

    Attributes:
        name: the format's.
        holds: the formats that it reads, for messages.
        packed: the weight is stored as something else than the tensor that `read` returns, which is made anew.
    """

    name: str
    holds: str
    packed: ClassVar[bool] = True

    @abstractmethod
    def matches(self, owner: nn.Module, param: str) -> bool:
        """Whether the weight is stored in this format. Must not import the format's library."""

    @abstractmethod
    def read(self, owner: nn.Module, param: str) -> Tensor:
        """The weight as a floating-point tensor, as the layer evaluates it, without a copy if possible."""

    @abstractmethod
    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        """Store `value` as the weight and return a token, not None, with which `restore` brings back the exact bits.

        A packed format's token holds the packed tensors, and no dense copy. Only called if `can_write` is True.
        """

    @abstractmethod
    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        """Undo a `write`."""

    @abstractmethod
    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        """The weight as `read` gave it before the `write` that returned `token`."""

    @abstractmethod
    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        """The floating-point dtype in which the layer computes, which those of adapters follow."""

    def can_write(self, owner: nn.Module, param: str) -> bool:
        """Whether `write` can store a weight in this format, and the layer then evaluates that weight, rounded."""
        return True

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        """A tensor in which the weight, or a part of it, is stored: on its device, another or changed when it does."""
        found = held_tensor(owner, param)
        assert found is not None
        return found

    def linear(self, module: nn.Module) -> tuple[str, int, int] | None:
        """Name of the weight, and sizes (in, out), of a linear layer of the library that is not an nn.Linear.

        None for every other module. The name is handed back as `param`; nothing has to be stored under it.
        """
        return None

    def bare(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Names and shapes, (experts, out, in), of weights that the module's forward takes as effective weights.

        Empty for a linear layer, and if only a kernel of the library can use them. The names need not be parameters.
        """
        return {}

    def used(self, owner: nn.Module, param: str) -> Tensor:
        """The weight for one call's products; a backend may dequantize it only there."""
        return self.read(owner, param)

    def plain(
        self, module: nn.Module, config: object, value: Callable[[str], Tensor], dtype: torch.dtype | None
    ) -> nn.Module:
        """A module of plain weights in place of one that has `bare` ones.

        Args:
            config: the model's.
            value: gives the weight of a name, (experts, out, in).
            dtype: of its tensors; None for that in which the module computes.
        """
        raise NotImplementedError(f"{self.name} has no bare weights")

    def settle(self, module: nn.Module) -> None:
        """What a module of the library needs so that a gradient goes through it; each is shown when adapters come."""

    def gathered(self, owner: nn.Module, param: str) -> None:
        """Raise RuntimeError, with the remedy, if a layer cannot run on its weight as fully_shard left it.

        Shown in the first step are all layers when they run, whatever they hold.
        """


def held_tensor(owner: nn.Module, name: str) -> Tensor | None:
    """A parameter, a buffer or a tensor as a plain attribute of a module's own, or None."""
    for table in (owner._parameters, owner._buffers, vars(owner)):
        found = table.get(name)
        if isinstance(found, Tensor):
            return found
    return None


def tensor_of(owner: nn.Module, name: str) -> Tensor:
    """The same of one that is there."""
    found = held_tensor(owner, name)
    assert found is not None, name
    return found


def put_tensor(owner: nn.Module, name: str, value: object) -> None:
    """Put a value where a module looks for one of its parameters; not only a Parameter, which torch insists on."""
    owner._parameters[name] = value  # type: ignore[assignment]


def is_float(weight: Tensor) -> bool:
    """Whether the entries are floating-point numbers that torch computes with."""
    return weight.is_complex() or (weight.is_floating_point() and weight.element_size() > 1)
