"""Every scenario, each in a process of its own; writes bench/results/soak.md: `python -m soak [NAME ...] [--small]`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.harness import load, taken_on  # noqa: E402

from . import concurrency, crashes, hostile, long_runs, trust  # noqa: E402

SCENARIOS = {s[0]: s for part in (hostile, crashes, concurrency, long_runs, trust) for s in part.SCENARIOS}


def one(name: str, size: int) -> None:
    """Run a scenario and print its figures as the last line."""
    print(json.dumps(SCENARIOS[name][1](size)))


def said(figures: dict[str, Any]) -> str:
    shown = {k: v for k, v in figures.items() if k not in ("ok", "wrong") and v not in ([], {}, 0, "")}
    return "; ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in shown.items())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument("--small", action="store_true", help="the sizes of make test; writes nothing")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        one(given.names[0], int(given.inside))
        return 0
    for name in given.names:
        if name not in SCENARIOS:
            parser.error(f"no scenario is named {name!r}; there are {', '.join(SCENARIOS)}")
    console, before, rows = Console(), load(), []
    for name in given.names or SCENARIOS:
        _, _, full, small, bar = SCENARIOS[name]
        size = small if given.small else full
        started = time.perf_counter()
        with console.status(f"{name}, {size:,}"):
            command = [sys.executable, "-m", "soak", name, "--inside", str(size)]
            done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        figures = (
            json.loads(lines[-1]) if done.returncode == 0 else {"ok": False, "wrong": done.stderr.splitlines()[-6:]}
        )
        took = time.perf_counter() - started
        rows.append((name, size, figures, bar, took))
        console.print(
            f"{'[green]ok[/]' if figures['ok'] else '[red]FAILED[/]'} {name} ({took:.0f} s): {escape(said(figures))}"
        )
        for line in figures.get("wrong", []):
            console.print(f"   {escape(str(line))}", style="red")
    table = Table("scenario", "size", "bar", "", "s")
    for name, size, figures, bar, took in rows:
        table.add_row(name, f"{size:,}", bar, "[green]met[/]" if figures["ok"] else "[red]NOT MET[/]", f"{took:.0f}")
    console.print(table)
    if not given.small and not given.names:
        write(rows, (before, load()))
        console.print("written to bench/results/soak.md")
    return 0 if all(r[2]["ok"] for r in rows) else 1


def write(rows: list[tuple[str, int, dict[str, Any], str, float]], loads: tuple[float, float]) -> None:
    lines = [
        "# Long and hostile runs", "", f"Taken by `make soak` on {taken_on(loads)}.", "",
        "| scenario | size | bar | | as measured | seconds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, size, figures, bar, took in rows:
        lines.append(
            f"| {name} | {size:,} | {bar} | {'met' if figures['ok'] else '**not met**'} | {said(figures)} | {took:.0f} |"
        )
    for name, _, figures, _, _ in rows:
        lines += [f"- {name}: {line}" for line in figures.get("wrong", [])]
    (ROOT / "bench" / "results" / "soak.md").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
