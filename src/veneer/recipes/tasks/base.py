"""What a task has to say for `veneer train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from ..errors import InputError
from ..models import find_model, load_model, load_tokenizer
from ..run import TASK_TYPES, Run

Row = dict[str, Any]


class Task:
    """What a model is for: its class, how rows become inputs, and what is measured.

    Attributes:
        name: value of `--task`.
        heads: names an output layer may have that is trained whole, where `peft_type` does not say so.
        auto: transformers' class that loads the model.
        by_token: the held-out loss is a mean over tokens; else Trainer's own evaluation is used, with `metrics`.
        by_length: rows are drawn with others of their length; they have `input_ids`.
        classes: it has an output for each of some classes.
    """

    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]] = ()
    auto: ClassVar[str]
    by_token: ClassVar[bool] = False
    by_length: ClassVar[bool] = True
    classes: ClassVar[bool] = False

    @property
    def peft_type(self) -> str | None:
        """`task_type` of the adapter's config."""
        return TASK_TYPES[self.name]

    def load_model(self, name: str, dtype: str = "float32", quantize: str | None = None, **options: object) -> Any:
        """The base model of this name for the task, quantized or not."""
        return load_model(name, self.auto_class(find_model(name)), self.name, dtype, quantize, **options)

    def auto_class(self, where: str) -> str:
        """The name of transformers' class for the model at `where`."""
        return self.auto

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        """The columns it can use, best first."""
        raise NotImplementedError

    def processor_of(self, model: str) -> Any:
        """The tokenizer or processor of a model, by its name."""
        return load_tokenizer(model)

    def processor(self, run: Run) -> Any:
        """The same, as a run wants it."""
        return self.processor_of(run.model)

    def files(self, run: Run) -> str | None:
        """The column with paths, which may be from the folder of their data file."""
        return None

    def check(self, run: Run, rows: list[Row], source: str) -> None:
        """Look at all rows before anything is loaded.

        Raises:
            InputError: a row that cannot be used, by its number and value.
        """

    def labels(self, run: Run, train: list[Row], held_out: list[Row]) -> list[str]:
        """Names of the classes; none where there are no classes."""
        return []

    def encode(self, run: Run, rows: list[Row], processor: object, labels: list[str]) -> list[Row]:
        """Rows as the collator wants them."""
        raise NotImplementedError

    def collator(self, run: Run, processor: object, model: object) -> Callable[[list[Row]], Any]:
        """What makes a batch of encoded rows."""
        raise NotImplementedError

    def metrics(self, prediction: object) -> dict[str, float]:
        """What is measured on transformers' `EvalPrediction`, where the loss is not by token."""
        return {}

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        """A row of what a user types: a text, a path, or a question and its context.

        Raises:
            InputError: it is not what the task needs.
        """
        raise NotImplementedError

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        """What is shown of each row beside the model's answer; fewer where a row has no such thing."""
        return []

    def answers(self, run: Run, model: object, processor: object, rows: list[Row]) -> list[str]:
        """The model's texts for rows, in the same order as `asked`."""
        return []

    def scored(self, run: Run) -> bool:
        """Whether all held-out rows are answered and `scores` measures the answers."""
        return False

    def scores(self, run: Run, rows: list[Row], answers: list[str]) -> dict[str, float]:
        """What the answers are worth, with the prefix `eval_`."""
        return {}


def class_names(run: Run, train: list[str], held_out: list[str], column: str) -> list[str]:
    """The classes of training rows, sorted.

    Raises:
        InputError: fewer than two, or held-out rows with others.
    """
    found = sorted(set(train))
    new = sorted(set(held_out) - set(found))
    if new:
        raise InputError(f"held-out rows have classes that are not trained on: {', '.join(new[:5])}")
    if len(found) < 2:
        raise InputError(f"column {column!r} has only the class {found}; {run.task} needs two or more")
    return found


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Share of rows, or of labelled tokens, whose largest logit is the label's."""
    import numpy as np

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counted = prediction.label_ids != -100
    return {"accuracy": float((np.argmax(logits, -1) == prediction.label_ids)[counted].mean())}


class OneClass(Task):
    """What texts and images have in common: a row has one class."""

    classes = True

    def labels(self, run: Run, train: list[Row], held_out: list[Row]) -> list[str]:
        c = run.label_column
        return class_names(run, [str(r[c]) for r in train], [str(r[c]) for r in held_out], c)

    def metrics(self, prediction: object) -> dict[str, float]:
        return compute_accuracy(prediction)

    def answers(self, run: Run, model: object, processor: object, rows: list[Row]) -> list[str]:
        return [with_share(model, logits) for _, (logits, _) in classify_rows(self, run, model, processor, rows)]


def classify_rows(task: Task, run: Run, model: Any, processor: Any, rows: list[Row]) -> Iterator[tuple[Row, Any]]:
    """Rows with their logits and labels, in batches as the run has them, without loss and dropout."""
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    batch = task.collator(run, processor, model)
    for at in range(0, len(rows), run.batch_size):
        some = rows[at : at + run.batch_size]
        inputs = {k: v.to(model.device) for k, v in batch(task.encode(run, some, processor, names)).items()}
        labels = inputs.pop("labels")
        with eval_mode(model):
            logits = model(**inputs).logits.float()
        yield from zip(some, zip(logits, labels, strict=True), strict=True)


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Within the block, a model is without dropout and keeps nothing for a backward."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def with_share(model: Any, logits: Any) -> str:
    """The class of the largest of some logits (classes,), and its probability."""
    share = logits.softmax(-1)
    return f"{model.config.id2label[int(share.argmax())]} ({float(share.max()):.0%})"


def complete_prompts(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, **options: Any) -> list[str]:
    """What a model says after each prompt, greedily unless `options` say otherwise."""
    answers = []
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        length = ids["input_ids"].shape[1]
        if not encoder_decoder and length > 1 and int(ids["input_ids"][0, -1]) == tokenizer.eos_token_id:
            ids = {k: v[:, :-1] for k, v in ids.items()}
            length -= 1
        with eval_mode(model):
            settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            out = model.generate(**ids, **{**settings, **options})[0]
        answers.append(tokenizer.decode(out if encoder_decoder else out[length:], skip_special_tokens=True).strip())
    return answers
