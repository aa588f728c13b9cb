"""Showing a plan: what is adapted, where the bytes go, what would fit."""

from __future__ import annotations

from typing import Any

import click

from ..planning import Plan, plan, size
from ..planning.layout import Peak
from ..recipes.errors import user_input


def plan_model(
    model: str, method: str, options: dict[str, Any], gpu: str | None, as_json: bool, settings: dict[str, Any]
) -> None:
    """Make a plan and print it."""
    from ..planning import skeleton
    from ..planning.estimate import FULL
    from ..recipes.run import Run
    from ..targets.suggest import suggest

    with user_input():
        if gpu is not None:
            size(gpu)  # complains before anything is built
        if method.lower() == FULL:
            if options:
                raise ValueError(f"method {FULL!r} has no field {next(iter(options))!r}; it trains all weights")
            config: Any = None
        else:
            known = settings.get("task") or skeleton.task_of(skeleton.load_configuration(model)[0])
            try:
                # what `veneer train` would use, its defaults included
                config = Run(model=model, data="-", task=known, method={"name": method, **options}).config()
            except ValueError as error:
                hint = suggest(method.lower(), [FULL])
                raise ValueError(f"{error}{hint}") from error
        found = plan(model, config, gpu=gpu, **{k: v for k, v in settings.items() if v is not None})
    if as_json:
        click.echo(found.to_json())
    else:
        show_plan(found)


def show_plan(found: Plan) -> None:
    """Print a plan as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console()
    share = 100 * found.trained / found.total
    console.print(f"[bold]{escape(found.model)}[/], {found.method}: {found.settings.layout} on {found.settings.device}")
    what = "the trained model" if found.method == "full" else "the adapter's file"
    console.print(
        f"trains {found.trained:,} of {found.total:,} numbers ({share:.3g}%); {what} is {format_mb(found.file)}"
    )

    if found.adapted:
        table = Table(Column("adapted", overflow="fold"), "shape (out, in)", "count")
        for g in found.adapted:
            table.add_row(escape(g.name), f"{g.shape[0]} x {g.shape[1]}", str(g.count))
        console.print(table)
    if found.missed:
        table = Table(Column("not adapted", overflow="fold"), "shape (out, in)", "count", "looks alike")
        for g in found.missed:
            table.add_row(escape(g.name), f"{g.shape[0]} x {g.shape[1]}", str(g.count), g.why)
        console.print(table)

    console.print(format_account(found.peak))
    if found.other is not None:
        with_or = "without" if found.settings.gradient_checkpointing else "with"
        console.print(f"{with_or} gradient checkpointing the peak is {format_gb(found.other.device)}")
    if found.gpu is not None:
        fits = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
        console.print(f"a device of {format_gb(found.gpu)}: it needs {format_gb(found.peak.card)} and {fits}")
    if found.changes:
        table = Table(
            "change", "device", "host", "", title="what would make it fit, cheapest first", title_justify="left"
        )
        for c in found.changes:
            table.add_row(
                c.name, format_gb(c.peak.card), format_gb(c.peak.host), "[green]fits[/]" if c.fits else "too much"
            )
        console.print(table)
        if found.remedy is None:
            console.print("nothing that was tried fits; shorter rows (--length) or a smaller model would")
        else:
            console.print(f"cheapest change that fits: [bold]{found.remedy.name}[/]")
    console.print("assumed", style="dim")
    for line in found.assumptions:
        console.print(f"- {escape(line)}", style="dim")


def format_account(peak: Peak) -> Any:
    """The table of a peak's parts."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("peak of one process", "bytes", "made of")
    for p in peak.parts:
        table.add_row(p.name, format_gb(p.bytes), escape(p.note))
    table.add_row("[bold]device[/]", f"[bold]{format_gb(peak.device)}[/]", "", end_section=not peak.outside)
    for p in peak.outside:
        table.add_row(p.name, format_gb(p.bytes), escape(p.note))
    if peak.outside:
        table.add_row("[bold]card[/]", f"[bold]{format_gb(peak.card)}[/]", "", end_section=True)
    for p in peak.host_parts:
        table.add_row(f"host: {p.name}", format_gb(p.bytes), escape(p.note))
    if peak.host_parts:
        table.add_row("[bold]host[/]", f"[bold]{format_gb(peak.host)}[/]", "")
    return table


def format_gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else format_mb(count)


def format_mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
