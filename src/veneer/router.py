"""Which adapters act, and in which order. One router per model, shared by every site.

Switching is an assignment of one tuple, however many sites there are. A choice made for one thread, with
`choose`, wins over the model's own, so that threads can generate with different adapters on one model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Shared(nn.Module):
    """Tensors that all sites of an adapter share (VeRA's projections), as buffers of the base model."""

    def put(self, adapter: str, name: str, value: Tensor) -> None:
        self.register_buffer(f"{name}:{adapter}", value, persistent=False)  # the codec saves them

    def get(self, adapter: str, name: str) -> Tensor:
        found = self._buffers[f"{name}:{adapter}"]
        assert found is not None
        return found

    def drop(self, adapter: str) -> None:
        for key in [k for k in self._buffers if k.endswith(f":{adapter}")]:
            del self._buffers[key]


class Router:
    """The active adapters of one model.

    Attributes:
        active: names in the order in which they are stacked, whether or not they are disabled.
        merged: names that are baked into the base weights, in their order.
        enabled: False inside `disable_adapter`.
        shared: state shared between sites.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        self.shared = Shared()
        self._local = threading.local()
        self._live: tuple[str, ...] = ()

    def live(self) -> tuple[str, ...]:
        """Names that a forward must apply now: chosen for this thread, or active; without the merged ones."""
        chosen: tuple[str, ...] | None = getattr(self._local, "chosen", None)
        return self._live if chosen is None else chosen

    def rows(self) -> tuple[str, ...] | None:
        """The adapter of each row of the batch, chosen for this thread, or None where all rows have the live ones."""
        rows: tuple[str, ...] | None = getattr(self._local, "rows", None)
        return rows

    def tasks(self) -> Tensor | None:
        """The task of each row (batch,), for adapters that hold several, or None."""
        tasks: Tensor | None = getattr(self._local, "tasks", None)
        return tasks

    def whole(self) -> bool:
        """Whether virtual positions stay in what the stacks return, for an objective that needs them."""
        return bool(getattr(self._local, "whole", False))

    def set(
        self,
        active: tuple[str, ...] | None = None,
        *,
        merged: tuple[str, ...] | None = None,
        enabled: bool | None = None,
    ) -> None:
        """Change any of the three; the sites see it on their next forward."""
        if active is not None:
            self.active = active
        if merged is not None:
            self.merged = merged
        if enabled is not None:
            self.enabled = enabled
        if not self.enabled:
            self._live = ()
        else:
            self._live = tuple(n for n in self.active if n not in self.merged) if self.merged else self.active

    @contextmanager
    def choose(self, names: tuple[str, ...]) -> Iterator[None]:
        """Within the block and in this thread only, apply `names` instead of the active adapters."""
        with self.hold(chosen=names):
            yield

    @contextmanager
    def hold(self, **choices: Any) -> Iterator[None]:
        """Within the block and in this thread only, hold `chosen`, `rows`, `tasks` or `whole`."""
        before = {name: getattr(self._local, name, None) for name in choices}
        for name, value in choices.items():
            setattr(self._local, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self._local, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()
