"""`veneer methods`: a table of the methods, or of one method's fields."""

from __future__ import annotations

from typing import Any

from ..recipes.describe_method import describe_method
from ..recipes.errors import InputError


def show_methods(name: str | None) -> None:
    """Print the methods, or the fields of one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..methods.registry import METHODS
    from ..targets.suggest import suggest

    console = Console()
    known = {key.lower(): cls for key, cls in sorted(METHODS.items())}
    if name is None:
        table = Table("name", "what it does", box=None, title="methods", title_justify="left", padding=(0, 2, 0, 0))
        for key, cls in known.items():
            table.add_row(key, escape(describe_method(cls).summary))
        console.print(table)
        console.print("veneer methods NAME shows the fields of one", style="dim")
        return
    if name.lower() not in known:
        raise InputError(f"no method is named {name!r}{suggest(name.lower(), known)}; there are {', '.join(known)}")
    cls = known[name.lower()]
    found = describe_method(cls)
    console.print(f"{escape(found.title)} ({cls.__name__}): {escape(found.summary)}", style="bold")
    for line in (found.equation, found.paper, f"{found.adapts} {'Merges' if found.merges else 'Does not merge'}."):
        if line:
            console.print(escape(line))
    console.print(f"veneer train uses {escape(format_settings(found.training))} unless told otherwise")
    table = Table("field", "type", "default", "meaning")
    for row in found.fields:
        table.add_row(*map(escape, row))
    console.print(table)


def format_settings(training: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in training.items())
