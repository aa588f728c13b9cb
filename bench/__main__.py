"""Run the benchmarks: `python -m bench [NAME ...] [--list] [--quick]`."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# glibc gives memory at the top of the heap back to the system, or does not, after some sizes of what lies below it: then
# one of two equal runs pays for fresh pages and the other does not. It reads this when a process starts.
if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    os.execv(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]])

import argparse
import time

from rich.console import Console
from rich.table import Table

from . import experts, gpu, memory, quantized, scaling, soft_prompts, speed, standin  # noqa: F401  # they register what they measure
from .figures import BENCHES, CHECKS
from .harness import Figure, Red, gain, headline, load, number, save

GROUPS: dict[str, list[str]] = {}  # module -> the names in it
for _name, _bench in BENCHES.items():
    GROUPS.setdefault(_bench.__module__.rpartition(".")[2], []).append(_name)


def summary(name: str) -> str:
    return (BENCHES[name].__doc__ or "").splitlines()[0]


def main() -> int:
    """Checks first, then speeds; 1 on a red check, and then no speed is reported."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of --list, or a group of them; all without any")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; results are shown and not saved")
    parser.add_argument("--save", metavar="FILE", help="keep the figures of the named ones, as bench/results/FILE.md")
    parser.add_argument(
        "--headline", action="store_true", help="keep the rows for the README, as bench/results/headline.md"
    )
    given = parser.parse_args()
    console = Console()
    if given.list:
        for group, names in GROUPS.items():
            console.print(f"[bold]{group}[/]")
            for name in names:
                console.print(f"  {name}: {summary(name)}", markup=False)
        return 0
    unknown = [n for n in given.names if n not in BENCHES and n not in GROUPS]
    if unknown:
        there = f"the groups {', '.join(GROUPS)}, and in them {', '.join(BENCHES)}"
        parser.error(f"no benchmark is named {unknown[0]!r}; there are {there}")
    named = [m for n in given.names for m in ([n] if n in BENCHES else GROUPS[n])]
    figures: list[Figure] = []
    before = load()
    # Checks come first; each speed also checks what it is about to time, so a name alone is safe.
    chosen = sorted(dict.fromkeys(named) or BENCHES, key=lambda n: n not in CHECKS)
    for i, name in enumerate(chosen, 1):
        console.print(f"[{i}/{len(chosen)}] {name}: {summary(name)}", markup=False)
        start = time.perf_counter()
        try:
            figures += BENCHES[name](given.quick)
        except Red as red:
            console.print(f"red: {red.what}\n  " + "\n  ".join(red.details), style="red", markup=False)
            console.print("no speed is reported", style="red")
            return 1
        console.print(f"      {time.perf_counter() - start:.0f} s, load {load()}", markup=False, style="dim")
    table = Table("figure", "measured", "bar", "", "peft", "peft / ours")
    for f in figures:
        verdict = {None: "", True: "[green]within[/]", False: "[red]above[/]"}[f.within]
        cells = (number(f.value, f.unit), number(f.bar, f.unit), verdict, number(f.reference, f.unit), gain(f))
        table.add_row(f.name, *cells)
    console.print(table)
    above = [f.name for f in figures if f.within is False]
    if above:
        console.print(f"above the bar: {', '.join(above)}", style="red", markup=False)
    if not given.quick and (given.save or not given.names):
        save(figures, (before, load()), given.save or "figures")
        if any(f.panel for f in figures):
            scaling.write(figures, (before, load()))
        console.print("written to bench/results")
    if not given.quick and given.headline:
        headline(figures, (before, load()))
        console.print("written to bench/results/headline.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
