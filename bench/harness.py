"""Measuring: interleaved runs, medians with spread, and what they are held against."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the median, in `unit`.
        low, high: the quartiles.
        unit: "ratio", "s", "us", "difference" or "bool".
        bar: what it is held against, or None for a figure that informs.
        reference: peft's value on the same work, in the same unit.
        note: anything that belongs to it.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    bar: float | None = None
    reference: float | None = None
    note: str = ""

    @property
    def within(self) -> bool | None:
        return None if self.bar is None else self.value <= self.bar


@dataclass
class Red(Exception):
    """A parity check failed: nothing is timed."""

    what: str
    details: list[str] = field(default_factory=list)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn A B A B ..., after unmeasured rounds."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        for name, run in runs.items():
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            kept = run()
            seconds = time.perf_counter() - start
            gc.enable()
            del kept
            if i >= warmup:
                taken[name].append(seconds)
    return taken


def figure(name: str, values: list[float], unit: str, **more: Any) -> Figure:
    """Median and quartiles of `values`."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Figure(name, statistics.median(values), low, high, unit, **more)


def ratio(name: str, a: list[float], b: list[float], **more: Any) -> Figure:
    """Ratios pair by pair, as they were taken in turn."""
    return figure(name, [x / y for x, y in zip(a, b, strict=True)], "ratio", **more)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch
    import transformers

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(figures: list[Figure]) -> None:
    """Write figures.json, README.md and figures.png."""
    RESULTS.mkdir(exist_ok=True)
    about = machine()
    data = {"machine": about, "figures": [{**asdict(f), "within": f.within} for f in figures]}
    (RESULTS / "figures.json").write_text(json.dumps(data, indent=2) + "\n")
    where = (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, {about['date']}"
    )
    lines = ["# Figures", "", f"Taken on {where}. Medians, with quartiles in brackets.", ""]
    lines += [
        "| figure | measured | bar | peft | |",
        "|---|---|---|---|---|",
        *map(line, figures),
        "",
        "![figures](figures.png)",
        "",
    ]
    (RESULTS / "README.md").write_text("\n".join(lines))
    plot(figures)


def number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bool":
        return "no" if value else "yes"
    text = f"{value:.3g}"
    return text if unit == "ratio" else f"{text} {unit}".replace(" difference", "")


def line(f: Figure) -> str:
    verdict = {None: "", True: "within", False: "**above**"}[f.within]
    spread = "" if f.unit in ("bool", "difference") or f.low == f.high else f" [{f.low:.3g}, {f.high:.3g}]"
    cells = (f.name + (f" ({f.note})" if f.note else ""), number(f.value, f.unit) + spread, number(f.bar, f.unit),
             number(f.reference, f.unit), verdict)  # fmt: skip
    return f"| {' | '.join(cells)} |"


def plot(figures: list[Figure]) -> None:
    """Every figure that has a bar, as its share of the bar."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [f for f in figures if f.bar]
    chart, axes = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.2), dpi=120)
    for i, f in enumerate(reversed(shown)):
        axes.barh(i, max(f.value / f.bar, 1e-4), color="#2a7f62" if f.within else "#b3402a")  # type: ignore[operator]
        if f.reference is not None:
            axes.plot(max(f.reference / f.bar, 1e-4), i, "D", color="#444444", markersize=4)  # type: ignore[operator]
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [f.name for f in reversed(shown)], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("measured / bar (left of the line is within); diamonds: peft")
    chart.tight_layout()
    chart.savefig(RESULTS / "figures.png")
    plt.close(chart)
