"""Training data: embedded translations and ratings, files, and data sets of the hub, as rows of plain columns."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..targets.suggest import suggest
from .errors import InputError
from .pictures import IMAGES, read_images
from .ratings import RATINGS, read_ratings
from .run import Run
from .tasks import TASKS

LANGUAGES = {"ui-en-es": ("es", "Spanish"), "ui-en-fr": ("fr", "French"), "ui-en-de": ("de", "German")}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
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


def load_data(run: Run) -> Data:
    """Read the run's data and split it, always in the same way for the same seed.

    Raises:
        InputError: data that cannot be found or read, or that lacks a column.
    """
    rows = read_rows(run.data)
    task = TASKS[run.task]
    check_columns(run, rows[0], run.data)
    rows = resolve_paths(rows, task.files(run), run.data)
    task.check(run, rows, run.data)
    if run.eval_data:
        train, held_out = rows, read_rows(run.eval_data)
        check_columns(run, held_out[0], run.eval_data)
        held_out = resolve_paths(held_out, task.files(run), run.eval_data)
        task.check(run, held_out, run.eval_data)
    else:
        rows = list(rows)
        random.Random(0).shuffle(rows)
        n = int(run.held_out) if run.held_out >= 1 else max(1, round(len(rows) * run.held_out))
        if not 0 < n < len(rows):
            raise InputError(f"held_out={run.held_out}: leaves {len(rows) - n} of {len(rows)} rows to train on")
        train, held_out = rows[n:], rows[:n]
    labels = task.labels(run, train, held_out)
    random.Random(run.seed).shuffle(train)
    return Data(train[: run.limit], held_out, labels)


def read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of an embedded data set, a file, or a data set of the hub."""
    if name in LANGUAGES:
        return read_translations(*LANGUAGES[name])
    if name in RATINGS:
        return read_ratings(name)
    if name in IMAGES:
        return read_images(name)
    path = Path(name)
    if any(p.suffix.lower() in PICTURES for p in path.glob("*/*")):
        return from_folder(path)
    if path.suffix.lower() in FILES:
        if not path.is_file():
            raise InputError(f"data {name!r}: there is no such file")
        return from_file(path)
    datasets = _import_datasets()
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:
        embedded = [*LANGUAGES, *RATINGS, *IMAGES]
        raise InputError(
            f"data {name!r}: not an embedded name ({', '.join(embedded)}){suggest(name, embedded)}, not a {', '.join(FILES)} file, and as "
            f"a datasets id it fails: {str(error).splitlines()[0]}"
        ) from error
    return list(found)


def from_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL, CSV or Parquet file."""
    datasets = _import_datasets()
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


def _import_datasets() -> Any:
    import datasets

    if not sys.stderr.isatty():  # a bar in a log file is a line of every state it had
        datasets.disable_progress_bars()
    return datasets


def resolve_paths(rows: list[dict[str, Any]], column: str | None, source: str) -> list[dict[str, Any]]:
    """Rows whose paths in a column are from here; in a file they may be from its folder."""

    def found(path: object) -> Any:
        near = Path(source).parent / path if isinstance(path, str) else None
        return str(near) if near is not None and near.is_file() else path

    return rows if column is None else [{**row, column: found(row[column])} for row in rows]


def from_folder(path: Path) -> list[dict[str, Any]]:
    """Images of a folder with a folder of files for each class, as paths."""
    kinds = sorted(p for p in path.iterdir() if p.is_dir())
    return [
        {"image": str(file.resolve()), "label": kind.name}
        for kind in kinds
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in PICTURES
    ]


def read_translations(code: str, language: str) -> list[dict[str, Any]]:
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


def check_columns(run: Run, row: dict[str, Any], source: str) -> None:
    wanted = TASKS[run.task].columns(run)
    if any(all(c in row for c in columns) for columns in wanted):
        return
    needs = " or ".join(" and ".join(map(repr, columns)) for columns in wanted)
    names = {value: key for key, value in vars(run).items() if key.endswith("_column")}
    flags = [f"--{names[c].replace('_', '-')}" for c in dict.fromkeys(c for columns in wanted for c in columns)]
    raise InputError(
        f"data {source!r} has the columns {', '.join(map(repr, row))}, but {run.task} needs {needs}; name yours with "
        f"{', '.join(flags)}"
    )
