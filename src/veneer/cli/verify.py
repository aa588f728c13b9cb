"""Checking a saved adapter in every way in which it will be used."""

from __future__ import annotations

from pathlib import Path

from ..recipes.errors import InputError, user_input
from ..recipes.trained import read_task


def verify_adapter(adapter: str, model: str | None, task: str | None, dtype: str) -> bool:
    """Print what was found, and write a certificate into the adapter's folder; whether all passed.

    Raises:
        InputError: no such adapter or model, or they do not go together.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import veneer

    from ..checks import verify as checks
    from ..files import certificate
    from ..methods.base import PeftConfig

    console = Console()
    with user_input():
        config = PeftConfig.from_pretrained(adapter)
        name = model or config.base_model_name_or_path
        if not name:
            raise InputError(f"{adapter} names no base model; give --model")
        purpose = read_task(adapter, config, task)
        with console.status(f"loading {name}"):
            base = purpose.load(name, dtype)
            adapted = veneer.PeftModel.from_pretrained(base, adapter)
        local = Path(adapter) if Path(adapter).is_dir() else None
        with console.status("loading, merging and unmerging in new processes"):
            found = checks.verify(adapted, local, base=name)
    table = Table("check", "", "difference", "", title=f"{adapter} on {name}", title_justify="left")
    colours = {"passed": "green", "FAILED": "red", "not applicable": "dim"}
    for what, verdict, difference, note in checks.table_rows(found):
        table.add_row(escape(what), f"[{colours[verdict]}]{verdict}[/]", difference, escape(note))
    console.print(table)
    effect = (
        "it changes nothing" if found.effect == 0 else f"it moves outputs by up to {found.effect:.2g} of the largest"
    )
    where = (
        f"{certificate.NAME} is in {adapter}" if local else "the adapter is not a folder, so no certificate was written"
    )
    console.print(f"{effect}; {where}", markup=False)
    return found.passed
