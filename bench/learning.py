"""What each method learns on real models: `python -m bench.learning [--only movie|en-es] [--methods NAME ...]`.

Every run is a `veneer train` with the method's own defaults. Results are kept by method: a method that has some is
passed over, unless --again is given.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .harness import RESULTS, load, machine

STORE = RESULTS / "learning.json"


@dataclass
class Task:
    """One model with data, and the methods that learn it.

    Attributes:
        title: what is learnt.
        run: keys of the recipe, the same for every method.
        quick: keys that make it short.
        methods: in the order of the table.
    """

    title: str
    run: dict[str, Any]
    quick: dict[str, Any]
    methods: tuple[str, ...]


TASKS = {
    "movie": Task(
        "MiniLM-L6-v2 on movie sentiment, 2,000 snippets to train on and 500 held out, 2 epochs",
        {"model": "minilm-l6-v2", "data": "movie-sentiment", "task": "classification", "limit": 2000, "held_out": 500,
         "epochs": 2, "batch_size": 16, "max_length": 64, "eval_every": 50, "save_every": 0, "samples": 0},
        {"limit": 200, "held_out": 100, "eval_every": 10},
        ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "IA3", "BOTTLENECK", "LN_TUNING", "BITFIT"),
    ),
    "en-es": Task(
        "SmolLM2-135M on English to Spanish, 75 steps of 8 rows, 64 rows held out",
        {"model": "smollm2-135m", "data": "ui-en-es", "steps": 75, "batch_size": 8, "max_length": 64, "held_out": 64,
         "eval_every": 15, "save_every": 0, "samples": 0},
        {"steps": 6, "held_out": 16, "eval_every": 3},
        ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "IA3", "BOTTLENECK", "LORA"),
    ),
}  # fmt: skip


def measure(task: Task, name: str, quick: bool) -> dict[str, Any]:
    """Train one method as `veneer train` does, and what came of it."""
    from veneer.recipes.recipe import build_run
    from veneer.recipes.train import train

    before = load()
    with tempfile.TemporaryDirectory() as folder:
        options = {**task.run, **(task.quick if quick else {}), "method": name.lower(), "out": folder}
        report = train(build_run(options, {}), overwrite=True)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
    curve = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    run = report.run
    return {
        "settings": {k: run[k] for k in ("learning_rate", "warmup", "scheduler", "batch_size", "seed")} | run["method"],
        "loss": [report.loss_before, report.loss_after],
        "accuracy": None if report.accuracy_after is None else [report.accuracy_before, report.accuracy_after],
        "trained_parameters": report.trained_parameters,
        "all_parameters": report.all_parameters,
        "adapter_bytes": report.adapter_bytes,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "curve": [[step, loss] for step, loss in sorted(curve.items())],
        "machine": {**machine(), "load_before": before, "load_after": load()},
    }


def table(task: Task, found: dict[str, Any]) -> list[str]:
    """A Markdown table of a task's results."""
    scored = any(r["accuracy"] for r in found.values())
    head = ["method", "accuracy", "held-out loss", "trained parameters", "file", "time", "learning rate"]
    rows = []
    for name in (n for n in task.methods if n in found):
        r = found[name]
        settings = r["settings"]
        rows.append([
            name.lower(),
            "{:.3f} -> {:.3f}".format(*r["accuracy"]) if r["accuracy"] else "",
            "{:.3f} -> {:.3f}".format(*r["loss"]),
            f"{r['trained_parameters']:,} ({100 * r['trained_parameters'] / r['all_parameters']:.2f}%)",
            f"{r['adapter_bytes'] / 1e6:.2f} MB",
            f"{r['seconds']:.0f} s",
            f"{settings['learning_rate']:g}, {settings['warmup']} steps of warm-up",
        ])  # fmt: skip
    if not scored:
        head, rows = [head[0], *head[2:]], [[row[0], *row[2:]] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def machines(results: dict[str, Any]) -> list[str]:
    """What the runs were taken on, each different one once."""
    keys = ("cpu", "cores", "threads", "torch", "transformers", "commit")
    texts = {}
    for r in (r for found in results.values() for r in found.values()):
        m = r["machine"]
        text = "{cpu}, {cores} cores, {threads} threads, torch {torch}, transformers {transformers}, commit {commit}"
        texts.setdefault(text.format(**{k: m[k] for k in keys}), []).append(max(m["load_before"], m["load_after"]))
    return [f"{text} ({len(loads)} runs, load up to {max(loads)})" for text, loads in texts.items()]


def save(results: dict[str, Any]) -> None:
    """Write learning.json, learning.md and learning.png."""
    RESULTS.mkdir(exist_ok=True)
    STORE.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    lines = ["# What each method learns", "", "Each with its own defaults in `veneer train`, one seed; time includes "
             "measuring before, during and after.", "", "Taken on:", "", *(f"- {m}" for m in machines(results))]  # fmt: skip
    for name, task in TASKS.items():
        if results.get(name):
            lines += ["", f"## {name}", "", f"{task.title}.", "", *table(task, results[name])]
    RESULTS.joinpath("learning.md").write_text("\n".join([*lines, "", "![curves](learning.png)", ""]), "utf-8")
    plot(results)


def plot(results: dict[str, Any]) -> None:
    """Held-out loss against step, every method of a task in one panel."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [n for n in reversed(TASKS) if results.get(n)]
    chart, panels = plt.subplots(1, len(shown), figsize=(6 * len(shown), 4.2), dpi=120, squeeze=False)
    for name, axes in zip(shown, panels[0], strict=True):
        for method in (m for m in TASKS[name].methods if m in results[name]):
            steps, losses = zip(*results[name][method]["curve"], strict=True)
            axes.plot(steps, losses, "o-", markersize=3, label=method.lower())
        axes.set(xlabel="optimizer step", ylabel="held-out loss (nats)", title=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    chart.tight_layout()
    chart.savefig(RESULTS / "learning.png")
    plt.close(chart)


def main() -> int:
    """Run what is missing, one after the other."""
    every = sorted({m for task in TASKS.values() for m in task.methods})
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("--only", choices=TASKS, help="one of the tasks")
    parser.add_argument("--methods", nargs="+", metavar="NAME", type=str.upper, help=f"of {', '.join(every)}".lower())
    parser.add_argument("--quick", action="store_true", help="short runs; results are shown and not saved")
    parser.add_argument("--again", action="store_true", help="also those that have results")
    given = parser.parse_args()
    unknown = [m for m in given.methods or [] if m not in every]
    if unknown:
        parser.error(f"no method of these tables is named {unknown[0].lower()!r}; there are {', '.join(every).lower()}")
    from veneer.methods.registry import registry

    console = Console()
    results: dict[str, Any] = json.loads(STORE.read_text("utf-8")) if STORE.is_file() and not given.quick else {}
    todo = [
        (name, method)
        for name, task in TASKS.items()
        if given.only in (None, name)
        for method in task.methods
        if given.methods is None or method in given.methods
    ]
    for i, (name, method) in enumerate(todo, 1):
        about = f"[{i}/{len(todo)}] {name}: {method.lower()}"
        if method not in registry():
            console.print(f"{about} is not registered", markup=False, style="dim")
        elif method in results.get(name, {}) and not given.again:
            console.print(f"{about} has results; --again measures it again", markup=False, style="dim")
        else:
            console.print(about, markup=False, style="bold")
            results.setdefault(name, {})[method] = measure(TASKS[name], method, given.quick)
            if not given.quick:
                save(results)
    for name in (n for n in TASKS if results.get(n)):
        console.print(
            "\n".join(["", TASKS[name].title, *table(TASKS[name], results[name])]), markup=False, soft_wrap=True
        )
    if not given.quick and results:
        save(results)  # the table and the plot, also where nothing was run
        console.print(f"in {STORE.with_suffix('.md')}, .json and .png", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
