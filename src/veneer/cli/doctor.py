"""Saying whether an adapter's files load elsewhere, and writing a copy that does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..recipes.errors import InputError, user_input


def examine_adapter(
    adapter: str, targets: str | None, fix: bool, out: Path | None, in_place: bool, dtype: str | None, as_json: bool
) -> None:
    """Print what programs mind about an adapter; exit with 1 where one of them will not load it, or loads something else."""
    import torch

    from ..checks.doctor import apply_fixes, default_folder, run_checks
    from ..checks.doctor_files import DIFFUSERS_NAME, AdapterFiles
    from ..checks.doctor_programs import TARGETS
    from ..io.locate import CONFIG_NAME, OLD_WEIGHTS_NAME, WEIGHTS_NAME
    from ..targets.suggest import suggest

    if (out is not None or in_place) and not fix:
        raise InputError("--out and --in-place say where --fix writes; give --fix too")
    if out is not None and in_place:
        raise InputError("--out and --in-place are two places to write to; give one of them")
    if out is not None:
        refuse_filled(out)
    with user_input():
        files = AdapterFiles.read(adapter)
        chosen = targets.split(",") if targets else list_programs(files.component)
        for name in chosen:
            if name not in TARGETS:
                raise InputError(f"--for {name}: must be of {', '.join(TARGETS)}{suggest(name, TARGETS)}")
        accepts = {name: TARGETS[name] for name in chosen}
        wanted = None if dtype is None else getattr(torch, dtype)
        if not fix:
            findings, written = run_checks(files, accepts, wanted), None
        else:
            fixed, findings = apply_fixes(files, accepts, wanted)
            written = None
            if any(f.fixed for f in findings):
                written = Path(adapter) if in_place else out or default_folder(adapter)
                if in_place and not written.is_dir():
                    raise InputError(f"{adapter} is no folder of this machine; write a copy with --out FOLDER")
                if not in_place:
                    refuse_filled(written)
                    copy_rest(adapter, written, {CONFIG_NAME, WEIGHTS_NAME, OLD_WEIGHTS_NAME, DIFFUSERS_NAME})
                fixed.write(written)
    stopped = {f.target for f in findings if f.level == "error" and not f.fixed}
    if as_json:
        said = {
            "adapter": adapter,
            "loads": {name: name not in stopped for name in chosen},
            "findings": [f.to_dict() for f in findings],
            "written": None if written is None else str(written),
        }
        click.echo(json.dumps(said, indent=2))
    else:
        show_findings(chosen, findings, written, fix)
    if stopped:
        raise SystemExit(1)


def list_programs(component: str | None) -> list[str]:
    """The programs that an adapter could be for."""
    if component is None:
        return ["vllm", "transformers", "peft"]
    return ["diffusers", "peft"] if component != "text_encoder" else ["diffusers", "transformers", "peft"]


def refuse_filled(out: Path) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"{out} exists and is not empty; give a new folder with --out")


def copy_rest(adapter: str, out: Path, but: set[str]) -> None:
    """Copy the files beside the adapter's own, such as its card and its tokenizer."""
    if Path(adapter).is_dir():
        out.mkdir(parents=True, exist_ok=True)
        for file in Path(adapter).iterdir():
            if file.is_file() and file.name not in but:
                shutil.copy2(file, out / file.name)


def show_findings(targets: Sequence[str], findings: Sequence[Any], written: Path | None, fix: bool) -> None:
    """Print one line a finding, and one a program."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    groups: dict[tuple[str, ...], list[str]] = {}  # what several programs mind in the same way is one line
    for f in findings:
        groups.setdefault((f.level, f.what, f.where, f.why, f.remedy, str(f.fixed)), []).append(f.target)
    if groups:
        table = Table("for", "what", "where", "why", "fixed by")
        for (level, what, where, why, remedy, fixed), names in groups.items():
            done = f"[green]fixed[/]: {escape(remedy.removeprefix('--fix: '))}" if fixed == "True" else escape(remedy)
            colour = "green" if fixed == "True" else colours[level]
            table.add_row(", ".join(names), f"[{colour}]{escape(what)}[/]", escape(where), escape(why), done)
        console.print(table)
    for name in targets:
        errors = [f for f in findings if f.target == name and f.level == "error" and not f.fixed]
        curable = sum(f.fix is not None for f in errors)
        if not errors:
            console.print(f"[green]{name}: will load[/]" + ("" if written is None else f" {escape(str(written))}"))
        else:
            what = f"{len(errors)} finding{'s' * (len(errors) > 1)}"
            console.print(f"[red]{name}: will not load, or not as it was trained[/] ({what}, --fix cures {curable})")
    if written is not None:
        console.print(f"wrote [bold]{escape(str(written))}[/]")
    elif fix:
        console.print("nothing was written: there is nothing that --fix cures")
    if "vllm" in targets:
        console.print("[dim]whether vLLM serves the base model's architecture with LoRA is not in these files[/]")
