"""`veneer inspect`: an adapter's config and tensors, without loading a model."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from ..io import locate
from ..recipes.describe_adapter import describe_adapter, read_header


def inspect_adapter(adapter: str, everything: bool, check: bool) -> None:
    """Print an adapter's config and its tensors."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, text in describe_adapter(adapter):
        grid.add_row(name, escape(text))
    console.print(grid)
    tensors = read_header(str(locate.find_file(adapter, locate.WEIGHTS_NAME)))

    table = Table("tensor", "shape", "dtype", "count")
    groups: dict[tuple[str, tuple[int, ...], str], int] = defaultdict(int)
    for key, (shape, dtype) in sorted(tensors.items()):
        name = key.removeprefix("base_model.").removeprefix("model.")
        groups[(name if everything else re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape, dtype)] += 1
    for (name, shape, dtype), count in groups.items():
        table.add_row(name, " x ".join(map(str, shape)), dtype, str(count))
    console.print(table)
    if check:
        _flag_tensors(console, adapter)


def _flag_tensors(console: Any, adapter: str) -> None:
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
