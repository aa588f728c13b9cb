"""What a run leaves behind: a table, a plot, and the same as files."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io import atomic_write, safe_read


@dataclass
class Report:
    """Figures of one run. Sizes are bytes, times seconds, losses means on held-out rows (nats).

    Attributes:
        measured: what else was measured on held-out rows, before and after.
    """

    run: dict[str, Any]
    loss_before: float
    loss_after: float
    accuracy_before: float | None
    accuracy_after: float | None
    measured: dict[str, tuple[float, float]]
    samples: list[dict[str, str]]
    trained_parameters: int
    all_parameters: int
    adapter_bytes: int
    model_bytes: int
    steps: int
    seconds: float
    peak_bytes: int

    def rows(self) -> list[tuple[str, str]]:
        """The figures as text."""
        rows = [("held-out loss", f"{self.loss_before:.3f} -> {self.loss_after:.3f}")]
        rows += [(f"held-out {n.replace('_', ' ')}", f"{b:.3f} -> {a:.3f}") for n, (b, a) in self.measured.items()]
        share = 100 * self.trained_parameters / self.all_parameters
        rows += [
            ("trained parameters", f"{self.trained_parameters:,} of {self.all_parameters:,} ({share:.2f}%)"),
            ("adapter / model size", f"{self.adapter_bytes / 1e6:.1f} MB / {self.model_bytes / 1e6:.1f} MB"),
            ("steps", str(self.steps)),
            ("time", f"{self.seconds:.0f} s"),
            ("peak memory", f"{self.peak_bytes / 1e9:.2f} GB"),
        ]
        return rows

    def save(self, folder: Path) -> None:
        """Write report.json and report.md."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        lines = ["# Report", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in self.rows())]
        if self.samples:
            lines += ["", "| prompt | before | after |", "|---|---|---|"]
            lines += [
                "| " + " | ".join(format_cell(s[k]) for k in ("prompt", "before", "after")) + " |" for s in self.samples
            ]
        lines += ["", "![loss](loss.png)", ""]
        atomic_write.save_text(folder / "report.md", "\n".join(lines))
        atomic_write.save_text(folder / "report.json", text)


def format_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def peak_memory() -> int:
    """The most memory this process has held: of the accelerator where there is one, else of the host."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot_losses(folder: Path, what: str = "loss") -> None:
    """Draw loss.png from metrics.jsonl."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = safe_read.json_lines(folder / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        points = {line["step"]: line[key] for line in lines if key in line}
        if points:
            axes.plot(list(points), list(points.values()), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel=what, title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    atomic_write.write_atomic(folder / "loss.png", lambda p: figure.savefig(p, format="png"))
    plt.close(figure)


def show_report(console: Any, report: Report, folder: Path) -> None:
    """Print the report."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "", show_header=False, title="report", title_justify="left")
    for name, text in report.rows():
        table.add_row(name, text)
    console.print(table)
    if report.samples:
        samples = Table("prompt", "before", "after", show_lines=True)
        for s in report.samples:
            samples.add_row(escape(s["prompt"]), escape(s["before"]), escape(s["after"]))
        console.print(samples)
    console.print(f"adapter, metrics.jsonl, loss.png and report.md are in [bold]{folder}[/]")
