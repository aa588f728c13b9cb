"""The watchdog in transformers' Trainer. Not imported with the package, as transformers is heavy."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..training.watch import Watch


class WatchCallback(TrainerCallback):
    """Looks at a Trainer's first two steps, as `veneer.watch` does; after these it does nothing.

    Trainer(model, args, ..., callbacks=[WatchCallback()])

    Args:
        action: "raise" raises `WatchError` for what makes training pointless and warns of the rest, "warn" only warns.

    Attributes:
        watch: what looks, once training has begun; its `findings` are what was found.
    """

    def __init__(self, action: str = "raise") -> None:
        self.action = action
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        compiled = bool(getattr(args, "torch_compile", False))
        self.watch = Watch(kwargs["model"], kwargs.get("optimizer"), action=self.action, compiled=compiled)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if self.watch is not None and not self.watch.closed:
            self.watch.finish()
