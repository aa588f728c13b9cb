"""Looking into an adapter's files without loading a model."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..io import locate, safe_read
from ..methods import config_file
from ..recipes.errors import InputError, user_input


def inspect(adapter: str, everything: bool, check: bool) -> None:
    """Print an adapter's config and its tensors."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, text in about(adapter):
        grid.add_row(name, escape(text))
    console.print(grid)
    tensors = header(str(locate.find_file(adapter, locate.WEIGHTS_NAME)))

    table = Table("tensor", "shape", "dtype", "count")
    groups: dict[tuple[str, tuple[int, ...], str], int] = defaultdict(int)
    for key, (shape, dtype) in sorted(tensors.items()):
        name = key.removeprefix("base_model.").removeprefix("model.")
        groups[(name if everything else re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape, dtype)] += 1
    for (name, shape, dtype), count in groups.items():
        table.add_row(name, " x ".join(map(str, shape)), dtype, str(count))
    console.print(table)
    if check:
        report(console, adapter)


def about(adapter: str) -> list[tuple[str, str]]:
    """What an adapter is, as names and texts."""
    config = config_file.load_config(adapter)
    path = locate.find_file(adapter, locate.WEIGHTS_NAME)
    if path is None:
        raise InputError(f"{adapter} holds no {locate.WEIGHTS_NAME}")
    tensors = header(str(path))
    size = sum(math.prod(shape) for shape, _ in tensors.values())
    dtypes = sorted({dtype for _, dtype in tensors.values()})
    hidden = {"peft_type", "base_model_name_or_path", "task_type", "peft_version", "inference_mode", "auto_mapping"}
    set_fields = {k: v for k, v in config.to_dict().items() if k not in hidden and v not in (None, False, {}, [])}
    return [
        ("method", f"{config.peft_type}  {type(config).__name__}"),
        ("base model", str(config.base_model_name_or_path)),
        ("task", str(config.task_type)),
        ("parameters", f"{size:,} in {len(tensors)} tensors, {', '.join(dtypes)}"),
        ("file", f"{path} ({os.path.getsize(path) / 1e6:.2f} MB)"),
        *trust(path),
        ("config", ", ".join(f"{k}={v}" for k, v in sorted(set_fields.items()))),
    ]


def trust(path: Path) -> list[tuple[str, str]]:
    """What an adapter's file says of its base, and what its certificate says of it."""
    from ..files.certificate import Certificate
    from ..io import fingerprint

    found = []
    if (base := fingerprint.read(path)) is not None:
        sizes = ", ".join(f"{k} {v}" for k, v in base.sizes.items())
        found.append(("trained on", f"{base.architecture}, {sizes}; fingerprint {base.id}"))
    if (certificate := Certificate.load(path.parent)) is not None:
        failed = [c.name for c in certificate.checks if c.passed is False]
        changed = certificate.differs(path.parent, whole=True)
        said = f"failed: {', '.join(failed)}" if failed else "passed"
        said = f"of other files: {'; '.join(changed)}" if changed else said
        found.append(
            ("verified", f"{certificate.date}, {said}; moves outputs by {certificate.effect:.2g} of the largest")
        )
    return found


def header(path: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> shape and dtype, from the file's header alone."""
    with user_input():
        return {k: (tuple(e["shape"]), e["dtype"]) for k, e in safe_read.tensor_header(Path(path))[0].items()}


def report(console: Any, adapter: str) -> None:
    """Flag tensors that are not finite or all zero."""
    bad = 0
    for key, tensor in sorted(locate.load_weights(adapter).items()):
        if not tensor.isfinite().all():
            console.print(f"[red]not finite[/] {key}")
            bad += 1
        elif not tensor.any():
            console.print(f"[yellow]all zero[/]   {key}")
            bad += 1
    console.print("every tensor is finite and not zero" if not bad else f"{bad} tensors flagged")
