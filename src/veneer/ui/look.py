"""How the page looks: its theme, its few styles, and what a run's state is drawn from."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd  # type: ignore[import-untyped]

from ..io import safe_read
from .runner import Job

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
CSS = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
#title h1 { margin: 0.4rem 0 0; font-size: 1.5rem; }
#title p { margin: 0 0 0.4rem; opacity: 0.75; }
.state { padding: 0.2rem 0; }
.state progress { width: 100%; height: 0.6rem; accent-color: var(--color-accent); }
.state .bad { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.state .line { display: flex; flex-wrap: wrap; gap: 0 1.2rem; justify-content: space-between; }
.gradio-container .prose table, .gradio-container .prose tr { width: 100%; border: 0 !important; }
.gradio-container .prose td {
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; padding: 0.35rem 0.5rem;
  overflow-wrap: anywhere;
}
.gradio-container .prose td:first-child { white-space: nowrap; width: 1%; padding-right: 1.5rem; opacity: 0.8; }
.gradio-container .prose thead { display: none; }
.answer textarea { font-size: 1rem; }
"""
COLOURS = {"training": "#0d9488", "held out": "#d97706"}
CURVES = {"loss": "training", "held_out_loss": "held out"}


def make_theme() -> Any:
    """Fonts are the system's: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md", font=FONTS, font_mono=MONO
    )


def draw_curve(folder: Path) -> pd.DataFrame | None:
    """The losses of a run: step, loss, and which; None before the first of training, as a plot never shows a curve that it began without."""
    rows = [
        (int(m["step"]), float(m[key]), label)
        for m in safe_read.json_lines(folder / "metrics.jsonl")
        for key, label in CURVES.items()
        if key in m and "step" in m
    ]
    return (
        pd.DataFrame(rows, columns=["step", "loss", "curve"])
        if any(which == "training" for *_, which in rows)
        else None
    )


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_state(job: Job | None) -> str:
    """Where a run is, as HTML."""
    if job is None:
        return '<div class="state">Nothing has been trained yet.</div>'
    step, name = job.step(), html.escape(job.name)
    passed = time.time() - job.started
    if job.state == "failed":
        return f'<div class="state"><span class="bad">{name} failed:</span> {html.escape(job.complaint())}</div>'
    if job.state == "stopped":
        return f'<div class="state"><b>{name}</b> was stopped at step {step}.</div>'
    if job.state == "finished":
        return f'<div class="state"><b>{name}</b> is finished: {step} steps. Its adapter is ready.</div>'
    points = safe_read.json_lines(job.folder / "metrics.jsonl")
    if not step:
        return f'<div class="state"><b>{name}</b>: loading and measuring before training, {format_duration(passed)}<progress></progress></div>'
    said = [f"step {step} of {job.steps}" if job.steps else f"step {step}"]
    said += [f"{label} {last:.3f}" for key, label in CURVES.items() if (last := latest_value(points, key)) is not None]
    if job.steps:
        begun = first_step(job)
        left = (time.time() - begun) / max(step, 1) * max(job.steps - step, 0)
        said.append(f"about {format_duration(left)} left" if step < job.steps else "measuring after training")
    share = f'value="{step}" max="{job.steps}"' if job.steps else ""
    spans = "".join(f"<span>{html.escape(s)}</span>" for s in said)
    return f'<div class="state"><div class="line"><b>{name}</b>{spans}</div><progress {share}></progress></div>'


def first_step(job: Job) -> float:
    """When training began, as far as the first line of the metrics tells."""
    path = job.folder / "before.json"
    return path.stat().st_mtime if path.is_file() else job.started


def latest_value(points: Sequence[dict[str, Any]], key: str) -> float | None:
    found = [float(m[key]) for m in points if key in m]
    return found[-1] if found else None


def format_report(folder: Path) -> dict[str, Any] | None:
    """A finished run's report."""
    path = folder / "report.json"
    try:
        return safe_read.json_object(path, nan=True)
    except (OSError, ValueError):
        return None


def format_figures(folder: Path) -> str:
    """The figures of a finished run's report, as a Markdown table."""
    path = folder / "report.md"
    if not path.is_file():
        return ""
    lines = path.read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and line.count("|") == 3]
    return "\n".join(["| measured | |", "|---|---|", *(r for r in rows if r.strip("| "))])


def format_samples(folder: Path) -> list[list[str]]:
    """Prompts of a finished run, with the answers before and after."""
    found = (format_report(folder) or {}).get("samples", [])
    return [[str(s.get(k, "")) for k in ("prompt", "before", "after")] for s in found]
