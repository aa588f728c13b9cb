"""Run the benchmarks: `python -m bench [NAME ...] [--quick]`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import sys

from rich.console import Console
from rich.table import Table

from .figures import BENCHES
from .harness import Figure, Red, number, save


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all without any")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; results are shown and not saved")
    given = parser.parse_args()
    unknown = [n for n in given.names if n not in BENCHES]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]!r}; there are {', '.join(BENCHES)}")
    console = Console()
    figures: list[Figure] = []
    chosen = given.names or list(BENCHES)
    if not given.names:
        chosen = ["parity", *[n for n in chosen if n != "parity"]]  # no speed on a red check
    for i, name in enumerate(chosen, 1):
        console.print(f"[{i}/{len(chosen)}] {name}: {(BENCHES[name].__doc__ or '').splitlines()[0]}", markup=False)
        try:
            figures += BENCHES[name](given.quick)
        except Red as red:
            console.print(f"red: {red.what}\n  " + "\n  ".join(red.details), style="red", markup=False)
            return 1
    table = Table("figure", "measured", "bar", "peft", "")
    for f in figures:
        verdict = {None: "", True: "[green]within[/]", False: "[red]above[/]"}[f.within]
        table.add_row(f.name, number(f.value, f.unit), number(f.bar, f.unit), number(f.reference, f.unit), verdict)
    console.print(table)
    if not given.names and not given.quick:
        save(figures)
        console.print("written to bench/results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
