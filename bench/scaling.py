"""Cost against work: what a step costs beside the frozen floor as tokens, layers, adapters and ranks grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .figures import median
from .harness import RESULTS, Figure, figure, interleaved, number, taken_on
from .trio import SAID, beside, drawn, floor, llama, pair, same_output, same_step, step, timed

WIDTH, R = 256, 8
GROWTH = 1.05  # no worse than the floor's, but for what two times differ by

Works = Mapping[int, Mapping[str, Callable[[], Any]]]


def trained(layers: int, ids: torch.Tensor, where: str, adapters: int = 1, r: int = R) -> dict[str, Callable[[], Any]]:
    """A step of the three, with `adapters` loaded and the first of them active."""
    base = llama(WIDTH, layers)
    models = {**pair(base, tuple(f"a{i}" for i in range(adapters)), r=r), "floor": floor(base)}
    for model in models.values():
        model.train()
    same_step(models, ids, where, adapter="a0")
    return {n: partial(step, m, ids) for n, m in models.items()}


def mixed(counts: tuple[int, ...], rows: int) -> Works:
    """A forward of `rows` rows with so many adapters among them."""
    base, ids = llama(WIDTH, 4), drawn(rows, 8)
    models: dict[str, Any] = {
        **pair(base, tuple(f"a{i}" for i in range(counts[-1])), r=R, task_type="CAUSAL_LM"),
        "base": base,
    }
    for model in models.values():
        model.eval()

    def run(model: Any, count: int) -> torch.Tensor:
        more = {} if model is base else {"adapter_names": [f"a{i * 7 % count}" for i in range(rows)]}
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **more).logits  # type: ignore[no-any-return]

    for count in counts:
        same_output(models, partial(run, count=count), f"{count} adapters in a batch")
    return {c: {"floor" if n == "base" else n: partial(run, m, c) for n, m in models.items()} for c in counts}


def measured(panel: str, unit: str, works: Works, rounds: int, note: str, bar: float | None = None) -> list[Figure]:
    """Step / floor of each amount of work, and how much it grew from the first to the last."""
    taken = interleaved({f"{n} {at}": run for at, runs in works.items() for n, run in runs.items()}, rounds, warmup=2)
    found = [
        beside(f"{panel}: {at} {unit}", taken, f"floor {at}", ours=f"veneer {at}", theirs=f"peft {at}", note=note,
               panel=panel, at=at)
        for at in works
    ]  # fmt: skip
    first, last = min(works), max(works)

    def grown(name: str) -> list[float]:
        times = (taken[f"{name} {last}"], taken[f"floor {last}"], taken[f"{name} {first}"], taken[f"floor {first}"])
        return [(a / b) / (c / d) for a, b, c, d in zip(*times, strict=True)]

    row = f"growth against the floor's, {first} to {last} {unit}" if bar else ""
    more = {"bar": bar, "reference": median(grown("peft")), "note": note, "row": row}
    found.append(figure(f"{panel}: growth of the ratio, {first} to {last}", grown("veneer"), "ratio", **more))
    return found


@timed
def scaling(quick: bool) -> list[Figure]:
    """Step / frozen floor against tokens, layers, adapters and rank, with how it grows."""
    rounds, found = 3 if quick else 9, []
    note = f"h={WIDTH}, r={R}"
    works: dict[int, dict[str, Callable[[], Any]]] = {
        n * 64: trained(4, drawn(n, 64), f"{n} x 64 tokens") for n in (1, 4, 16)
    }
    found += measured("tokens", "tokens", works, rounds, f"training step, 4 layers, {note}; {SAID}", GROWTH)
    works = {n: trained(n, drawn(4, 64), f"{n} layers") for n in (2, 8)}
    found += measured("layers", "layers", works, rounds, f"training step, 4 x 64 tokens, {note}", GROWTH)
    counts = (1, 4) if quick else (1, 8, 64)
    works = {n: trained(4, drawn(4, 64), f"{n} adapters", adapters=n) for n in counts}
    found += measured(
        "adapters loaded",
        "adapters",
        works,
        rounds,
        f"training step, one active, 4 x 64 tokens, 4 layers, {note}",
        GROWTH,
    )
    found += measured(
        "adapters in a batch", "adapters", mixed(counts, 64), rounds, f"forward, 64 rows x 8 tokens, 4 layers, {note}"
    )
    works = {r: trained(4, drawn(4, 64), f"rank {r}", r=r) for r in (4, 16, 64, 256)}
    found += measured(
        "rank", "channels", works, rounds, f"training step, 4 x 64 tokens, 4 layers, h={WIDTH}; the floor does not grow"
    )
    return found


def write(figures: list[Figure], loads: tuple[float, float]) -> None:
    """Keep the points as bench/results/scaling.md and scaling.png."""
    points = [f for f in figures if f.panel]
    panels = {p: [f for f in points if f.panel == p] for p in dict.fromkeys(f.panel for f in points)}
    lines = [
        "# Cost against work",
        "",
        f"Taken on {taken_on(loads)}. Time relative to the same work of the frozen model without an adapter (1), medians, "
        "with quartiles in brackets.",
        "",
        "| work | | Veneer / floor | peft / floor |",
        "|---|---|---|---|",
    ]
    for panel, own in panels.items():
        for f in own:
            spread = f"{number(f.value, f.unit)} [{f.low:.3g}, {f.high:.3g}]"
            lines.append(f"| {panel} | {f.at} | {spread} | {number(f.reference, f.unit)} |")
    lines += [
        "",
        *(f"- {panel}: {own[0].note}" for panel, own in panels.items()),
        "",
        "![cost against work](scaling.png)",
        "",
    ]
    (RESULTS / "scaling.md").write_text("\n".join(lines))
    plot(panels)


def plot(panels: Mapping[str, list[Figure]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    chart, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.8), dpi=120, squeeze=False)
    for ax, (panel, own) in zip(axes[0], panels.items(), strict=True):
        at = [f.at for f in own]
        ax.plot(at, [f.value for f in own], "o-", color="#2a7f62", label="Veneer")
        ax.fill_between(at, [f.low for f in own], [f.high for f in own], color="#2a7f62", alpha=0.2, linewidth=0)
        ax.plot(at, [f.reference for f in own], "D-", color="#888888", label="peft", markersize=4)
        ax.axhline(1, color="black", linewidth=1, label="floor")
        ax.set_xscale("log", base=2)
        ax.set_xticks(at, [str(n) for n in at])
        ax.minorticks_off()
        ax.set_ylim(bottom=0.9)
        ax.set_title(panel, fontsize=9)
        ax.tick_params(labelsize=7)
    axes[0][0].set_ylabel("time / floor", fontsize=8)
    axes[0][0].legend(fontsize=7)
    chart.tight_layout()
    chart.savefig(RESULTS / "scaling.png")
    plt.close(chart)
