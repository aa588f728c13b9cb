"""What an adapter was trained for: `adapter_task.json`, which `veneer train` writes beside it, or what its files tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io import atomic_write, locate, safe_read
from .errors import InputError
from .tasks import TASKS

if TYPE_CHECKING:
    from ..methods.base import Method
    from .run import Run

NAME = "adapter_task.json"
HEADS = ("score", "classifier", "out_proj", "fc", "_fc", "head")  # output layers with a row for each class


@dataclass(frozen=True)
class Trained:
    """An adapter's task.

    Attributes:
        task: name of the task, as `veneer train --task` takes it.
        labels: names of the classes, in the order of the head's rows; none where there are no classes.
        image_size: pixels of an image's side, where it is not the model's own.
    """

    task: str
    labels: tuple[str, ...] = ()
    image_size: int | None = None

    def save(self, folder: Path) -> None:
        values = {"task": self.task, "labels": list(self.labels), "image_size": self.image_size}
        text = json.dumps({k: v for k, v in values.items() if v}, indent=2, ensure_ascii=False) + "\n"
        atomic_write.save_text(folder / NAME, text)

    def load(self, model: str, dtype: str = "float32", quantize: str | None = None) -> Any:
        """The base model with a head for these classes."""
        options: dict[str, Any] = {}
        if self.labels:
            names = dict(enumerate(self.labels))
            options = {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}
            options["ignore_mismatched_sizes"] = True  # a head for other classes is replaced
        return TASKS[self.task].load_model(model, dtype, quantize, **options)

    def run(self, model: str, **fields: Any) -> Run:
        """A run of this task, for what the task does with a model and rows."""
        from .run import Run

        return Run(model=model, data="-", task=self.task, image_size=self.image_size, **fields)


def read_task(adapter: str, config: Method, task: str | None = None) -> Trained:
    """The task of a saved adapter: as asked for, as its `adapter_task.json` says, or as its config does.

    Raises:
        InputError: a damaged `adapter_task.json`.
    """
    path = locate.find_file(adapter, NAME)
    if path is not None:
        values = safe_read.json_object(path)
        labels = values.get("labels", [])
        size = values.get("image_size")
        if (
            values.get("task") not in TASKS
            or not isinstance(labels, list)
            or not all(isinstance(n, str) for n in labels)
            or not (size is None or (type(size) is int and 8 <= size <= 16384))
        ):
            raise InputError(
                f"{path}: task must be one of {', '.join(TASKS)}, labels a list of names; it holds {str(values)[:80]}"
            )
        if task in (None, values["task"]):
            return Trained(values["task"], tuple(labels), size)
    chosen = task or next((k for k, t in TASKS.items() if t.peft_type and t.peft_type == config.task_type), "causal-lm")
    return Trained(chosen, number_labels(adapter) if TASKS[chosen].classes else ())


def number_labels(adapter: str) -> tuple[str, ...]:
    """Classes without names, as many as the trained head in an adapter's file has rows; none where it has no head."""
    path = locate.find_file(adapter, locate.WEIGHTS_NAME)
    tensors = {} if path is None else safe_read.tensor_header(path)[0]
    for head in HEADS:
        for key, entry in tensors.items():
            if key.endswith(f".{head}.weight") and len(entry["shape"]) == 2:
                return tuple(f"LABEL_{i}" for i in range(entry["shape"][0]))
    return ()
