"""A run: its fields and what is allowed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..targets.suggest import suggest
from .models import QUANTIZED

# The tasks, and `task_type` in the config of an adapter for each: peft's list has none for images and speech.
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "image-classification": None,
    "speech-recognition": None,
}
PLAIN = {"learning_rate": 1e-3, "warmup": 0}  # where neither the user nor the method says more


def make_field(default: object, text: str, *, allowed: tuple[Any, ...] = (), low: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "allowed": allowed, "low": low})


def check_fields(run: Any) -> None:
    """Raise ValueError for a field of a run whose value is not allowed."""
    for f in dataclasses.fields(run):
        value = getattr(run, f.name)
        low, allowed = f.metadata["low"], f.metadata["allowed"]
        if value is None or f.name == "method":
            continue
        if allowed and value not in allowed:
            hint = suggest(str(value), map(str, allowed))
            raise ValueError(f"{f.name}={value!r}: must be one of {', '.join(map(str, allowed))}{hint}")
        if low is not None and value < low:
            raise ValueError(f"{f.name}={value!r}: must be {low} or more")


def training_defaults(cls: Any, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run with this method uses where the user says nothing: keys of a run, and of the method's config."""
    return {**PLAIN, **cls.recipe_for(given or {})}


@dataclass
class Run:
    """What `veneer train` does. Every field is a key of a recipe and a flag.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    model: str = make_field("", "hub id, folder, or embedded name (smollm2-135m, minilm-l6-v2, whisper-tiny.en, ...)")
    data: str = make_field(
        "",
        "embedded name (ui-en-es, movie-sentiment, ...), a JSONL, CSV or Parquet file, a folder with a folder of images for each class, or a datasets id",
    )
    task: str = make_field("causal-lm", "what the model is for: " + ", ".join(TASK_TYPES), allowed=tuple(TASK_TYPES))
    method: dict[str, Any] = field(
        default_factory=lambda: {"name": "lora"},
        metadata={
            "help": "the method; its fields are flags too, see `veneer methods NAME`",
            "allowed": (),
            "low": None,
        },
    )
    out: str = make_field("", "folder for the adapter, its checkpoints and the report [default: runs/DATA-METHOD]")
    eval_data: str | None = make_field(None, "held-out data, like --data [default: a part of --data]")
    held_out: float = make_field(0.1, "part of the data, or number of rows, kept for measuring", low=0)
    prompt_column: str = make_field("prompt", "column with the input of a completion")
    completion_column: str = make_field("completion", "column with the text to learn")
    text_column: str = make_field("text", "column with plain text, with what is classified, or with what is said")
    label_column: str = make_field("label", "column with the class")
    image_column: str = make_field("image", "column with an image: its path, beside the data file or from here")
    audio_column: str = make_field("audio", "column with a sound file: its path, beside the data file or from here")
    words_column: str = make_field("words", "column with lists of words")
    labels_column: str = make_field("labels", "column with lists of the words' classes")
    boxes_column: str = make_field("boxes", "column with lists of where the words stand on a page of 1000 by 1000")
    context_column: str = make_field("context", "column with the text that answers stand in")
    question_column: str = make_field("question", "column with the question")
    answer_column: str = make_field("answer", "column with the answer, a text or SQuAD's text and answer_start")
    image_size: int | None = make_field(None, "pixels of an image's side [default: the model's]", low=8)
    evaluate: str = make_field(
        "loss",
        "what is measured before and after, of causal-lm and seq2seq-lm: loss, or generate, the share of held-out "
        "completions that are generated word for word too",
        allowed=("loss", "generate"),
    )
    chat: bool = make_field(False, "wrap prompts and completions in the model's chat template")
    limit: int | None = make_field(None, "use this many training rows at most", low=1)
    epochs: float = make_field(1.0, "passes over the data, unless --steps is given", low=0)
    steps: int | None = make_field(None, "optimizer steps", low=1)
    batch_size: int = make_field(8, "rows a step, shared among the processes", low=1)
    gradient_accumulation: int = make_field(1, "batches an optimizer step", low=1)
    learning_rate: float | None = make_field(None, "peak learning rate [default: the method's]", low=0)
    warmup: int | None = make_field(None, "steps of linear warm-up [default: the method's]", low=0)
    scheduler: str = make_field("linear", "how the rate falls", allowed=("linear", "cosine", "constant"))
    weight_decay: float = make_field(0.0, "weight decay", low=0)
    max_length: int = make_field(128, "tokens a row is cut to", low=4)
    dtype: str = make_field("float32", "dtype of the frozen model", allowed=("float32", "bfloat16", "float16"))
    quantize: str | None = make_field(
        None, "storage of the frozen linear layers, by bitsandbytes: " + ", ".join(QUANTIZED), allowed=QUANTIZED
    )
    gradient_checkpointing: bool = make_field(False, "compute activations again in backward, to save memory")
    liger: bool = make_field(False, "Liger's fused cross-entropy, to save the memory of the logits (needs a GPU)")
    eval_every: int = make_field(25, "steps between measurements of the held-out loss; 0 only at the ends", low=0)
    save_every: int = make_field(50, "steps between checkpoints; 0 for none", low=0)
    log_every: int = make_field(5, "steps between lines of metrics.jsonl", low=1)
    watch: bool = make_field(True, "look at the first two steps for what would make training pointless")
    samples: int = make_field(3, "generations shown before and after", low=0)
    max_new_tokens: int = make_field(32, "tokens of a shown generation", low=1)
    seed: int = make_field(0, "seed of everything random", low=0)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name} or the key {name!r} in the recipe ({HELP[name]})")
        self.method = {"name": "lora", **self.method}
        for key, value in training_defaults(self.method_class, {"task": self.task, **self.method}).items():
            if key not in HELP:
                self.method.setdefault(key, value)
            elif getattr(self, key) is None:
                setattr(self, key, value)

    @property
    def folder(self) -> Path:
        stem = Path(self.data).stem if Path(self.data).suffix else self.data.replace("/", "-")
        return Path(self.out) if self.out else Path("runs") / f"{stem}-{self.method['name']}"

    @property
    def method_class(self) -> Any:
        """The method's config class.

        Raises:
            ValueError: an unknown method.
        """
        from ..methods.registry import METHODS

        name = str(self.method["name"])
        known = {key.lower(): cls for key, cls in METHODS.items()}
        if name.lower() not in known:
            raise ValueError(
                f"method={name!r}: must be one of {', '.join(sorted(known))}{suggest(name.lower(), known)}"
            )
        return known[name.lower()]

    def config(self) -> Any:
        """The method's config.

        Raises:
            ValueError: an unknown field, or a value out of its range.
        """
        cls, options = self.method_class, dict(self.method)
        name = options.pop("name")
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        for key in options:
            if key not in fields and key not in cls.foreign:
                raise ValueError(
                    f"method {name!r} has no field {key!r}{suggest(key, fields)}; see: veneer methods {name}"
                )
        try:
            return cls(task_type=TASK_TYPES[self.task], **options)
        except TypeError as error:
            raise ValueError(f"method {name!r}: {error}") from error


FIELDS = dataclasses.fields(Run)
HELP: dict[str, str] = {}
for _f in FIELDS:
    _default = "" if _f.default in (dataclasses.MISSING, None, "") else f" [default: {_f.default}]"
    HELP[_f.name] = _f.metadata["help"] + _default
