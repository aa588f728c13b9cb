"""Calls of an adapted model: the forward, `generate`, and what is said of single rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..injection import checkpointing
from ..injection.router import Rows
from .facade import ModelFacade

if TYPE_CHECKING:
    pass


class Calls(ModelFacade):
    """The calls of `PeftModel`."""

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The base model's forward, with the active adapters.

        Takes two arguments more: `adapter_names`, the adapter of each row ("__base__" for none), and `task_ids`, the
        task of each row (batch,) for adapters that hold several.
        """
        with self._by_row(args, kwargs):
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._checkpointed()
            return self.base_model.model(*args, **kwargs)

    def generate(self, *args: object, **kwargs: object) -> Any:
        """The base model's `generate`, with the active adapters; takes `adapter_names` and `task_ids` as the forward."""
        with self._by_row(args, kwargs), self.runtime.router.hold(decoding={}):
            return cast(Any, self.get_base_model()).generate(*args, **kwargs)

    def _checkpointed(self) -> None:
        """See that gradient checkpointing passes gradients on, which a Trainer may have turned on after attaching."""
        root = self.get_base_model()
        if "_carrier" not in self.__dict__:
            self.__dict__["_carrier"] = checkpointing.find_carrier(root)
        block = self.__dict__["_carrier"]
        if block is not None and block.gradient_checkpointing:
            checkpointing.enter_block(root, block)

    def _by_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Hold what is said of single rows, and take it out of the call."""
        if "adapter_names" not in kwargs and "task_ids" not in kwargs:
            return nullcontext()
        names, tasks = kwargs.pop("adapter_names", None), kwargs.pop("task_ids", None)
        router = self.runtime.router
        if tasks is not None:
            tasks = torch.as_tensor(tasks)
            if tasks.is_floating_point() or tasks.dtype == torch.bool:
                raise ValueError(f"task_ids are {tasks.dtype}; give whole numbers, one for each row")
        batch = rows_of(args, kwargs)
        for given in (names, tasks):
            if given is not None and batch is not None and len(given) != batch:
                raise ValueError(
                    f"adapter_names or task_ids are for {len(given)} rows, but the batch has {batch}; give one for each row"
                )
        if names is not None:
            for name in dict.fromkeys(names):
                if name != "__base__":
                    self.runtime.config_of(name)
            if router.merged:
                raise ValueError(
                    "adapter_names: adapters are merged into the base weights; call unmerge_adapter() first"
                )
            self._recall()
        return router.hold(rows=None if names is None else Rows(names), tasks=tasks)

    def _recall(self) -> None:
        """See that what is chosen for one call holds where gradient checkpointing runs a block again."""
        if self.training and torch.is_grad_enabled():
            checkpointing.recall_state(self.get_base_model(), self.runtime.router)


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Rows of the batch that a call is given, or None where it does not tell."""
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("inputs"), *args[:1]):
        if isinstance(given, Tensor) and given.ndim > 1:
            return int(given.shape[0])
    return None
