"""Listing the methods."""

from __future__ import annotations

import dataclasses

from .errors import InputError


def methods(name: str | None) -> None:
    """Print the methods, or the fields of one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..method import METHODS, suggest

    console = Console()
    known = {key.lower(): cls for key, cls in sorted(METHODS.items())}
    if name is None:
        table = Table("name", "config", "what it does", title="methods", title_justify="left")
        for key, cls in known.items():
            table.add_row(key, cls.__name__, escape((cls.__doc__ or "").strip().splitlines()[0]))
        console.print(table)
        return
    if name.lower() not in known:
        raise InputError(f"no method is named {name!r}{suggest(name.lower(), known)}; there are {', '.join(known)}")
    cls = known[name.lower()]
    lines = (cls.__doc__ or "").strip().splitlines()
    console.print(escape(lines[0]), style="bold")
    texts = describe(lines)
    table = Table("field", "type", "default", "meaning")
    for f in dataclasses.fields(cls):
        if f.init and f.name in texts:
            default = getattr(cls(), f.name)
            table.add_row(f.name, escape(str(f.type)), escape(repr(default)), escape(texts[f.name]))
    console.print(table)


def describe(lines: list[str]) -> dict[str, str]:
    """Field -> its text in the "Args:" part of a docstring."""
    texts: dict[str, str] = {}
    current, inside = "", False
    for line in lines:
        stripped = line.strip()
        if stripped.endswith(":") and " " not in stripped:
            inside = stripped == "Args:"
        elif inside and line.startswith(" " * 8) and not line.startswith(" " * 12):
            current, _, text = stripped.partition(": ")
            texts[current] = text
        elif inside and current and stripped:
            texts[current] += f" {stripped}"
    return texts
