"""A pytest plugin that writes the support table from what ran: `pytest -p support --support docs/support.md`.

A cell is a pair of rows, (method, layer) or (method, backend), read off the parameters of the tests. It holds what all of
its tests say: passed, refused with a clear error, or failed. Where no test ran for a pair, the pair is left blank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

REFUSALS = ("refus",)  # in the names of tests that pass where a method says no
TITLE = "# What runs on what"
PASSED, MERGE, REFUSED, FAILED = "yes", "yes, dense", "no", "FAILED"

Cells = dict[tuple[str, str], set[str]]  # row and column -> what its tests said


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", metavar="FILE", help="write the support table of the tests that run to FILE")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    column = next((p for p in ("layer", "backend") if p in parameters), None)
    if "method" not in parameters or column is None or (report.when != "call" and not report.failed):
        return
    said = "failed" if report.failed else "skipped" if report.skipped else item.originalname  # type: ignore[attr-defined]
    report.user_properties.append(("cell", json.dumps([column, parameters["method"], parameters[column], said])))


class Collector:
    """Gathers the cells of a run, from all its processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Cells] = {"layer": {}, "backend": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "cell":
                kind, row, column, said = json.loads(str(value))
                self.cells[kind].setdefault((row, column), set()).add(said)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            self.path.write_text(page(self.cells["layer"], self.cells["backend"]), "utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--support"):
        config.pluginmanager.register(Collector(Path(config.getoption("--support"))))


def word(said: Iterable[str], column: str) -> str:
    """What a cell shows for what its tests said."""
    from backends import FORMATS

    said = set(said) - {"skipped"}
    if not said:
        return ""
    if "failed" in said:
        return FAILED
    if all(any(r in name for r in REFUSALS) for name in said):
        return REFUSED
    if column in FORMATS and "test_merge" in said and not FORMATS[column].writes:
        return MERGE
    return PASSED


def table(rows: Iterable[str], columns: Iterable[str], cells: Cells) -> list[str]:
    columns = list(columns)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        shown = [word(cells.get((row, c), ()), c) for c in columns]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return lines


def columns_of_layers() -> tuple[list[str], list[str]]:
    """The layers of the test table: weights, and normalisation layers."""
    from table import LAYERS

    norms = [n for n, layer in LAYERS.items() if "norm" in layer.tags]
    return [n for n in LAYERS if n not in norms], norms


def page(layers: Cells, backends: Cells) -> str:
    """The page, from the cells of a run."""
    from backends import FORMATS
    from table import LAYERS, METHODS

    runs = [n for n, f in FORMATS.items() if f.runs]
    kinds = [(f"| {n} | {f.library or '-'} |", f) for n, f in FORMATS.items()]
    lines = [
        TITLE,
        "",
        "Written by `make support` from the tests that passed, never by hand. Rows are the rows of `tests/table.py`: a",
        "method, or one of its settings.",
        "",
        f"- **{PASSED}**: forward, gradients, files, and merging where the method merges at all.",
        f"- **{MERGE}**: the same, but the merged weight cannot be quantized again; `export_dense` and",
        "  `merge_and_unload(dequantize=True)` merge into the dequantized weight.",
        f"- **{REFUSED}**: refused with an error that says why.",
        "- blank: the method's config has no way to name such a layer, or it has no meaning there.",
        "",
        "## Methods and storage formats",
        "",
        "Of a linear layer, on a CPU. Outputs and gradients are those of the same adapter on the dequantized weight.",
        "",
        *table((m for m in METHODS if m != "tokens"), runs, backends),
        "",
        "| format | library | merge | on a CPU |",
        "|---|---|---|---|",
    ]
    for start, row in kinds:
        merge = "quantizes again; unmerging restores the bits" if row.writes else "into the dequantized weight"
        here = row.note or "runs"
        lines.append(f"{start} {merge} | {here} |")
    lines += [
        "| mxfp4 | transformers | into the dequantized weight | gpt-oss' experts and their adapters run, dequantized one by "
        "one; the layout is that of transformers' kernels, which come from the hub and were not run |",
        "",
        "Only linear layers are adapted where they are quantized, and experts in mxfp4 (by `target_parameters`, with what",
        "takes bare parameters): other kinds are refused by name. A format that has no row here is refused too, and the",
        "error says how to add one.",
        "",
        "## Methods and layers",
        "",
        "Of plain weights.",
        "",
        *table(METHODS, LAYERS, layers),
        "",
    ]
    return "\n".join(lines)


def parsed(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """The tables of a page: columns and rows."""
    tables: list[tuple[list[str], list[list[str]]]] = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if len(lines) > 2 and lines[1].startswith("|---"):
            rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
            tables.append((rows[0][1:], rows[2:]))
    return tables
