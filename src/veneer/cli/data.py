"""Training data: embedded translations and ratings, files, and data sets of the hub, as rows of plain columns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..targets import suggest
from .errors import InputError
from .ratings import RATINGS, rated
from .recipe import Run

LANGUAGES = {"ui-en-es": ("es", "Spanish"), "ui-en-fr": ("fr", "French"), "ui-en-de": ("de", "German")}
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Data:
    """Rows to train on and rows to measure on.

    Attributes:
        train: rows, each a dict of columns.
        held_out: rows that are never trained on.
        labels: names of the classes, for classification.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    labels: list[str]


def load(run: Run) -> Data:
    """Read the run's data and split it, always in the same way for the same seed.

    Raises:
        InputError: data that cannot be found or read, or that lacks a column.
    """
    rows = read(run.data)
    if run.eval_data:
        train, held_out = rows, read(run.eval_data)
    else:
        rows = list(rows)
        random.Random(0).shuffle(rows)
        n = int(run.held_out) if run.held_out >= 1 else max(1, round(len(rows) * run.held_out))
        if not 0 < n < len(rows):
            raise InputError(f"held_out={run.held_out}: leaves {len(rows) - n} of {len(rows)} rows to train on")
        train, held_out = rows[n:], rows[:n]
    check_columns(run, train[0], run.data)
    check_columns(run, held_out[0], run.eval_data or run.data)
    labels: list[str] = []
    if run.task == "classification":
        labels = sorted({str(r[run.label_column]) for r in train})
        new = sorted({str(r[run.label_column]) for r in held_out} - set(labels))
        if new:
            raise InputError(f"held-out rows have classes that are not trained on: {', '.join(new[:5])}")
        if len(labels) < 2:
            raise InputError(
                f"column {run.label_column!r} has only the class {labels}; classification needs two or more"
            )
    random.Random(run.seed).shuffle(train)
    return Data(train[: run.limit], held_out, labels)


def read(name: str) -> list[dict[str, Any]]:
    """Rows of an embedded data set, a file, or a data set of the hub."""
    if name in LANGUAGES:
        return translations(*LANGUAGES[name])
    if name in RATINGS:
        return rated(name)
    path = Path(name)
    if path.suffix.lower() in FILES:
        if not path.is_file():
            raise InputError(f"data {name!r}: there is no such file")
        return from_file(path)
    import datasets

    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:
        embedded = [*LANGUAGES, *RATINGS]
        raise InputError(
            f"data {name!r}: not an embedded name ({', '.join(embedded)}){suggest(name, embedded)}, not a {', '.join(FILES)} file, and as "
            f"a datasets id it fails: {str(error).splitlines()[0]}"
        ) from error
    return list(found)


def from_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL, CSV or Parquet file."""
    import datasets

    builder = FILES[path.suffix.lower()]
    try:
        found = datasets.load_dataset(builder, data_files=str(path), split="train")
    except Exception as error:
        cause = error.__cause__ or error
        raise InputError(f"data {str(path)!r} cannot be read as {builder}: {str(cause).splitlines()[0]}") from error
    rows = list(found)
    if not rows:
        raise InputError(f"data {str(path)!r} has no rows")
    return rows


def translations(code: str, language: str) -> list[dict[str, Any]]:
    """English UI strings of Django and their translations (BSD-3), as prompts and completions."""
    try:
        import django
        import polib
    except ModuleNotFoundError as error:
        raise InputError(f"the embedded translations need {error.name}; install: pip install 'veneer[demo]'") from error
    pairs: dict[str, str] = {}
    for file in sorted(Path(django.__file__).parent.glob(f"**/locale/{code}/LC_MESSAGES/*.po")):
        for entry in polib.pofile(str(file)):
            usable = entry.translated() and not entry.msgid_plural and entry.msgid != entry.msgstr
            if usable and "\n" not in entry.msgid + entry.msgstr:
                pairs.setdefault(entry.msgid, entry.msgstr)
    return [{"prompt": f"English: {s}\n{language}:", "completion": f" {t}"} for s, t in sorted(pairs.items())]


def wanted(run: Run) -> list[tuple[str, ...]]:
    """The columns a task can use, best first."""
    if run.task == "classification":
        return [(run.text_column, run.label_column)]
    pair = (run.prompt_column, run.completion_column)
    return [pair] if run.task == "seq2seq-lm" else [pair, (run.text_column,)]


def check_columns(run: Run, row: dict[str, Any], source: str) -> None:
    if any(all(c in row for c in columns) for columns in wanted(run)):
        return
    needs = " or ".join(" and ".join(map(repr, columns)) for columns in wanted(run))
    raise InputError(
        f"data {source!r} has the columns {', '.join(map(repr, row))}, but {run.task} needs {needs}; name yours with "
        "--prompt-column, --completion-column, --text-column or --label-column"
    )


def encode(run: Run, rows: list[dict[str, Any]], tokenizer: Any, labels: list[str]) -> list[dict[str, Any]]:
    """Rows as token ids and labels, cut to `max_length`; prompts carry no loss (-100)."""
    cut = {"truncation": True, "max_length": run.max_length}
    made = []
    for row in rows:
        if run.task == "classification":
            ids = tokenizer(str(row[run.text_column]), **cut)
            made.append({**ids, "labels": labels.index(str(row[run.label_column]))})
        elif run.task == "seq2seq-lm":
            ids = tokenizer(str(row[run.prompt_column]), **cut)
            made.append({**ids, "labels": tokenizer(text_target=str(row[run.completion_column]), **cut)["input_ids"]})
        elif run.prompt_column in row and run.completion_column in row:
            made.append(completion(run, str(row[run.prompt_column]), str(row[run.completion_column]), tokenizer))
        else:
            ids = tokenizer(str(row[run.text_column]), **cut)["input_ids"]
            made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})
    kept = [m for m in made if not isinstance(m["labels"], list) or any(t != -100 for t in m["labels"])]
    if not kept:
        raise InputError(
            f"max_length={run.max_length}: prompts alone are longer, so nothing is left to learn; raise it"
        )
    return kept


def completion(run: Run, prompt: str, text: str, tokenizer: Any) -> dict[str, Any]:
    """One prompt with its completion, for a causal model."""
    head = tokenizer(prompt_text(run.chat, prompt, tokenizer), add_special_tokens=not run.chat)["input_ids"]
    tail = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        if head and head[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            head = head[:-1]
        tail = [*tail, tokenizer.eos_token_id]
    ids = (head + tail)[: run.max_length]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": ([-100] * len(head) + tail)[: run.max_length],
    }


def prompt_text(chat: bool, prompt: str, tokenizer: Any) -> str:
    """A prompt as the model sees it."""
    if not chat:
        return prompt
    if not tokenizer.chat_template:
        raise InputError("chat=True: the model's tokenizer has no chat template; leave chat out")
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
