"""What is shown and written while the Trainer runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..io import atomic_write, safe_read


class Before(TrainerCallback):
    """Calls something when everything is ready for the first step."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.run()


class Bar(TrainerCallback):
    """A progress bar with the losses."""

    def __init__(self, console: Any, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        )
        self.progress = Progress(*columns, console=console)
        self.console, self.total = console, total
        self.task: Any = None
        self.losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("training", total=self.total, completed=state.global_step, losses="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        if not self.console.is_terminal and state.global_step % max(1, self.total // 5) == 0:
            self.console.print(f"step {state.global_step} of {self.total}  {self.text()}")

    def on_log(self, args: object, state: object, control: object, logs: dict[str, Any], **kwargs: object) -> None:
        self.losses |= {n: logs[k] for k, n in (("loss", "loss"), ("eval_loss", "held-out")) if k in logs}
        if self.task is not None:
            self.progress.update(self.task, losses=self.text())

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.progress.stop()

    def text(self) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in self.losses.items())


class Metrics(TrainerCallback):
    """Writes one line a log to a file; a resumed run goes on where its checkpoint was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self.path.is_file():
            kept = [m for m in safe_read.json_lines(self.path) if m.get("step", 0) <= state.global_step]
            atomic_write.save_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        names = {"loss": "loss", "eval_loss": "held_out_loss", "eval_accuracy": "accuracy", "grad_norm": "grad_norm",
                 "learning_rate": "learning_rate"}  # fmt: skip
        names |= {k: k.removeprefix("eval_") for k in logs if k in ("eval_f1", "eval_exact_match")}
        line = {"step": state.global_step, **{n: logs[k] for k, n in names.items() if k in logs}}
        if len(line) > 1:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
