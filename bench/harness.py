"""Measuring: interleaved runs, medians with spread, and what they are held against."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the median, in `unit`.
        low, high: the quartiles.
        unit: "ratio", "s", "us", "bytes", "difference" or "bool" (0 is yes).
        bar: what it is held against, or None for a figure that informs.
        reference: peft's value on the same work, in the same unit.
        note: anything that belongs to it.
        row: what the headline table calls it, or "" where it is not in it.
        panel: the curve of cost against work that it is a point of, or "".
        at: where on that curve.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    bar: float | None = None
    reference: float | None = None
    note: str = ""
    row: str = ""
    panel: str = ""
    at: int = 0

    @property
    def within(self) -> bool | None:
        """Whether the bar is met; a value that is no number meets none."""
        return None if self.bar is None else self.value <= self.bar


@dataclass
class Red(Exception):
    """A parity check failed: nothing is timed."""

    what: str
    details: list[str] = field(default_factory=list)


class Worst:
    """The largest of many differences and where it was. One that is no number is the largest of all."""

    def __init__(self) -> None:
        self.value, self.where, self.count = 0.0, "", 0

    def add(self, value: float, where: str) -> None:
        self.count += 1
        if not value <= self.value and not math.isnan(self.value):
            self.value, self.where = value, where

    def figure(self, name: str, bar: float) -> Figure:
        if not self.count:
            raise Red(name, ["nothing was compared"])
        note = f"{self.count} compared; worst: {self.where}" if self.where else f"{self.count} compared"
        return Figure(name, self.value, self.value, self.value, "difference", bar=bar, note=note)


def require(figures: list[Figure]) -> list[Figure]:
    """The figures of a parity check, or Red if one is above its bar."""
    above = [f"{f.name}: {f.value:.2e}, bar {f.bar:.0e} ({f.note})" for f in figures if f.within is False]
    if above:
        raise Red("parity check", above)
    return figures


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    after: Mapping[str, Callable[[], Any]] | None = None,
    settle: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn A B A B ..., after unmeasured rounds.

    Args:
        after: what puts the state back after a run, outside the time.
        settle: how often each runs, untimed, right before it is timed, as in a loop of its own: else it finds caches and
            memory as another left them.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        gc.collect()
        for name, run in runs.items():
            for _ in range(settle):
                run()
            gc.disable()
            start = time.perf_counter()
            kept = run()
            seconds = time.perf_counter() - start
            gc.enable()
            del kept
            if after and name in after:
                after[name]()
            if i >= warmup:
                taken[name].append(seconds)
    return taken


def figure(name: str, values: list[float], unit: str, **more: Any) -> Figure:
    """Median and quartiles of `values`."""
    one = len(values) == 1
    low, _, high = (values[0],) * 3 if one else statistics.quantiles(values, n=4, method="inclusive")
    return Figure(name, statistics.median(values), low, high, unit, **more)


def ratio(name: str, a: list[float], b: list[float], **more: Any) -> Figure:
    """Ratios pair by pair, as they were taken in turn."""
    return figure(name, [x / y for x, y in zip(a, b, strict=True)], "ratio", **more)


def commit() -> str:
    """Commit of the code that is measured, marked where src or bench differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "src", "bench/*.py"], capture_output=True, text=True, check=False
    )
    return (head.stdout.strip() or "unknown") + ("+changes" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    graphics = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": cpu,
        **graphics,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def load() -> float:
    """Processes that were running or waiting over the last minute."""
    return round(os.getloadavg()[0], 2)


def taken_on(loads: tuple[float, float]) -> str:
    """The machine and the versions, in words."""
    about = machine()
    return (
        f"{about['gpu'] + ', ' if 'gpu' in about else ''}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
        f"transformers {about['transformers']}, peft {about['peft']}, commit {about['commit']}, {about['date']}, "
        f"load {loads[0]} before and {loads[1]} after"
    )


def headline(figures: list[Figure], loads: tuple[float, float]) -> None:
    """Write headline.md: the rows for the README, with the machine."""
    lines = [
        f"Taken on {taken_on(loads)}; parity with peft was checked first. Medians, with quartiles in brackets.",
        "",
        "| | Veneer | peft | bar |",
        "|---|---|---|---|",
    ]
    for f in (f for f in figures if f.row):
        spread = "" if f.low == f.high else f" [{f.low:.3g}, {f.high:.3g}]"
        cells = (f.row, number(f.value, f.unit) + spread, number(f.reference, f.unit), number(f.bar, f.unit))
        above = " (above)" if f.within is False else ""
        lines.append(f"| {' | '.join(cells)}{above} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "headline.md").write_text("\n".join([*lines, ""]))


def save(figures: list[Figure], loads: tuple[float, float], name: str = "figures") -> None:
    """Write NAME.json, NAME.png and a table: README.md of all figures, NAME.md of some.

    Args:
        loads: load of the machine before and after; more than its threads means that others were at work.
    """
    RESULTS.mkdir(exist_ok=True)
    about = {**machine(), "load_before": loads[0], "load_after": loads[1]}
    data = {"machine": about, "figures": [{**asdict(f), "within": f.within} for f in figures]}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    above = [f.name for f in figures if f.within is False]
    lines = [
        "# Figures",
        "",
        f"Taken on {taken_on(loads)}. Medians, with quartiles in brackets; the last column is peft's value over ours.",
        "",
        f"Above the bar: {', '.join(above)}." if above else "No figure is above its bar.",
        "",
        "| figure | measured | bar | | peft | peft / ours |",
        "|---|---|---|---|---|---|",
        *(row(f) for f in figures if not f.panel),
        "",
        f"![figures]({name}.png)",
        "",
    ]
    (RESULTS / ("README.md" if name == "figures" else f"{name}.md")).write_text("\n".join(lines))
    plot(figures, name)


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bool":
        return "no" if value else "yes"
    if unit == "bytes":
        return f"{value:,.0f}"
    return f"{value:.3g}" if unit in ("ratio", "difference") else f"{value:.3g} {unit}"


def gain(f: Figure) -> str:
    """Peft's value over ours."""
    return "" if f.reference is None or not f.value or f.unit == "bool" else f"{f.reference / f.value:.3g}"


def row(f: Figure) -> str:
    verdict = {None: "", True: "within", False: "**above**"}[f.within]
    spread = "" if f.unit in ("bool", "difference") or f.low == f.high else f" [{f.low:.3g}, {f.high:.3g}]"
    cells = [
        f.name + (f" ({f.note})" if f.note else ""),
        number(f.value, f.unit) + spread,
        number(f.bar, f.unit),
        verdict,
        number(f.reference, f.unit),
        gain(f),
    ]
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def plot(figures: list[Figure], name: str) -> None:
    """Every figure that has a bar, as its share of the bar."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(f, f.bar) for f in reversed(figures) if f.bar]
    chart, axes = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.2), dpi=120)
    for i, (f, bar) in enumerate(shown):
        axes.barh(i, max(f.value / bar, 1e-4), color="#2a7f62" if f.within else "#b3402a")
        if f.reference is not None:
            axes.plot(max(f.reference / bar, 1e-4), i, "D", color="#444444", markersize=4)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [f.name for f, _ in shown], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("measured / bar (left of the line is within); diamonds: peft")
    chart.tight_layout()
    chart.savefig(RESULTS / f"{name}.png")
    plt.close(chart)
