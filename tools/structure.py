"""Measures the structure of src/veneer from its source alone, against the bars of the design.

    python tools/structure.py                          the table; exit code 1 if a bar is missed
    python tools/structure.py --only circles,flat      some rows
    python tools/structure.py --why circles            the places behind a figure
    python tools/structure.py --json                   the same for programs
    python tools/structure.py --svg FILE               the floors and their imports as a picture

Nothing is imported from the package: every figure is read from the syntax trees, the tokens and the paths of the files.
The rules about imports are in tools/floors.py, for tests/test_rules.py as well.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluators import find_evaluators
from floors import (
    CORE,
    FLOORS,
    LEVEL,
    find_circles,
    find_misplaced_packages,
    find_silent_packages,
    find_upward_arrows,
    packages_of,
)
from floors_svg import draw_floors
from hand_lists import find_hand_lists
from source_tree import PACKAGE, Function, Source, last_name

LONG_FILE = 500
DIRECTIVE = re.compile(r"#\s*(type:|noqa|fmt:|mypy:|ruff:|pragma)")

# What the author of a method reads: the hooks, the declaration of tensors and the contract of an operator, the method nearest to LoKr, its row in the
# table of the tests and the section of CONTRIBUTING.md. The first file that exists counts, whole. (The 1,430 is
# method.py, operators.py, methods/loha.py and the whole of tests/table.py before the rebuilding.)
EXAMPLE = "loha"
READINGS: tuple[tuple[str, ...], ...] = (
    ("methods/hooks.py", "method.py"),
    ("methods/tensors.py",),
    ("algebra/operator.py", "algebra/operators.py", "operators.py"),
    (f"methods/{EXAMPLE}.py",),
)


def count_reading(source: Source) -> tuple[int, list[str]]:
    """Lines to read before writing a method, and where they are."""
    parts: list[tuple[str, int]] = []
    for candidates in READINGS:
        known = {m.relative.as_posix(): m.lines for m in source}
        name = next((c for c in candidates if c in known), candidates[0])
        parts.append((name, known.get(name, 0)))
    guide = source.root / "CONTRIBUTING.md"
    text = guide.read_text("utf-8") if guide.is_file() else ""
    section = re.search(r"^## Add a method\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    parts.append(('CONTRIBUTING.md, "Add a method"', 0 if section is None else len(section[0].strip().splitlines())))
    table = source.root / "tests" / "table.py"
    rows = 0
    for node in ast.walk(ast.parse(table.read_text("utf-8"))) if table.is_file() else ():
        if isinstance(node, ast.FunctionDef) and node.name == "row":
            rows += _span(node)
        elif isinstance(node, ast.Dict):
            keys = [(k, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
            rows += sum((v.end_lineno or 0) - k.lineno + 1 for k, v in keys if k.value == EXAMPLE)
    parts.append((f"tests/table.py, row() and the row of {EXAMPLE}", rows))
    return sum(n for _, n in parts), [f"{n:5,} {name}" if n else f"    - {name} (not found)" for name, n in parts]


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    key: str
    title: str
    value: float
    bar: float
    note: str = ""
    places: list[str] = field(default_factory=list)
    digits: int = 0
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def row(self) -> tuple[str, str, str, str, str]:
        value = f"{self.value:,.{self.digits}f}{f' ({self.note})' if self.note else ''}"
        verdict = "ok" if self.holds else "under" if self.at_least else "over"
        return self.key, self.title, value, f"{'>=' if self.at_least else '<='} {self.bar:,g}", verdict


def measure_imports(source: Source) -> Iterator[Figure]:
    circles = find_circles(source)
    places = []
    for circle in circles:
        names = {name: source.modules[name].relative.as_posix() for name in circle}
        places.append(f"a circle of {len(circle)}: {', '.join(names.values())}")
        places += [f"  {source.show_arrow(a)}" for a in source.arrows if a.source in names and a.target in names]
    largest = f"largest {max(map(len, circles), default=0)}"
    yield Figure("circles", "files in import circles", sum(map(len, circles)), 0, largest, places)

    upward, misplaced = find_upward_arrows(source), find_misplaced_packages(source)
    places = [f"{p}/ is on no floor of FLOORS" for p in misplaced] + [source.show_arrow(a) for a in upward]
    note = f"{len(misplaced)} on no floor" if misplaced else ""
    yield Figure("upward", "imports up the floors, packages on no floor", len(places), 0, note, places)

    silent = find_silent_packages(source)
    yield Figure("sentences", "packages that do not say what they may import", len(silent), 0, "", silent)


def measure_sizes(source: Source) -> Iterator[Figure]:
    flat = [m for m in source if not m.package]  # the 25 leaves __init__ out
    yield Figure("flat", f"modules flat in src/{PACKAGE}", len(flat), 2, "", [m.at(1) for m in flat])

    long = sorted((m for m in source if m.lines > LONG_FILE), key=lambda m: -m.lines)
    core = [m.at(m.lines, "lines") for m in long if m.package in CORE]
    others = [m.at(m.lines, "lines") for m in long if m.package not in CORE]
    yield Figure("core-files", f"files above {LONG_FILE} lines in the core", len(core), 0, "", core)
    yield Figure("other-files", f"files above {LONG_FILE} lines elsewhere", len(others), 2, "", others)

    classes = [(m, n) for m in source for n in m.nodes if isinstance(n, ast.ClassDef)]
    for key, title, size, bar in (
        ("class-lines", "lines of the largest class", _span, 300),
        ("class-methods", "methods of the class with most", _count_methods, 20),
    ):
        ranked = sorted(classes, key=lambda c: -size(c[1]))
        over = [m.at(n, f"{n.name} {size(n)}") for m, n in ranked if size(n) > bar]
        name, value = (ranked[0][1].name, size(ranked[0][1])) if ranked else ("", 0)
        yield Figure(key, title, value, bar, name, over)

    yield Figure("lines", f"lines of src/{PACKAGE}", source.lines, 30_202, f"{len(source.modules)} files")


def measure_methods(source: Source) -> Iterator[Figure]:
    evaluators = find_evaluators(source)
    yield Figure("evaluators", "places that evaluate the recursion", len(evaluators), 1, "", evaluators)

    lists = find_hand_lists(source)
    places = ["methods/NAME.py", "tests/table.py: one row", *(p for shown in lists.values() for p in shown)]
    note = f"2 + {len(lists)} by hand" if lists else ""
    yield Figure("touch", "places to touch for a new method", 2 + len(lists), 2, note, places)

    lines, places = count_reading(source)
    yield Figure("read", "lines to read before writing LoKr", lines, 400, "", places)


def measure_style(source: Source) -> Iterator[Figure]:
    """Rates. Per 1,000 and per 100 lines means lines of the files, blank ones and docstrings included."""
    # Parameters without self and cls, *args and **kwargs: only those are a choice. `Any` alone counts, not list[Any].
    total, places = 0, []
    for module in (m for m in source if m.package in CORE):
        for function in (n for n in module.nodes if isinstance(n, Function)):
            a = function.args
            for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs):
                if arg.arg not in ("self", "cls"):
                    total += 1
                    if arg.annotation is not None and last_name(arg.annotation) == "Any":
                        places.append(module.at(arg, f"{function.name}({arg.arg})"))
    yield _rate("any", "parameters typed Any in the core, %", places, 100 * len(places) / max(total, 1), 1)

    per_line = 1 / max(source.lines, 1)
    places = [m.at(t.start[0], t.string) for m in source for t in m.comments if "type: ignore" in t.string]
    yield _rate("ignores", "type: ignore per 1,000 lines", places, 1000 * len(places) * per_line, 2)

    calls = [(m, n) for m in source for n in m.nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    places = [m.at(n, ast.unparse(n)) for m, n in calls if last_name(n.func) in ("getattr", "hasattr")]
    yield _rate("getattr", "getattr + hasattr per 1,000 lines", places, 1000 * len(places) * per_line, 3)

    # All comments, as in the 3.5; those that speak to tools are no whys, so the note is without them.
    comments = sum(len(m.comments) for m in source)
    whys = sum(not DIRECTIVE.match(t.string) for m in source for t in m.comments)
    fewest = sorted((m for m in source if m.lines >= 50), key=lambda m: (len(m.comments) / m.lines, -m.lines))
    places = [m.at(1, f"{len(m.comments)} comments in {m.lines} lines") for m in fewest]
    note = f"{100 * whys * per_line:.1f} without directives"
    value = 100 * comments * per_line
    yield Figure("comments", "comments per 100 lines", value, 6, note, places, digits=2, at_least=True)

    functions = [(m, n) for m in source for n in m.tree.body if isinstance(n, Function) and not n.name.startswith("__")]
    places = [m.at(n, n.name) for m, n in functions if "_" not in n.name.strip("_")]
    value = 100 * len(places) / max(len(functions), 1)
    yield _rate("names", "one-word names of module-level functions, %", places, value, 20)


def _rate(key: str, title: str, places: list[str], value: float, bar: float) -> Figure:
    return Figure(key, title, value, bar, f"{len(places):,}", places, digits=2)


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _count_methods(cls: ast.ClassDef) -> int:
    return sum(isinstance(n, Function) for n in cls.body)


MEASURES: tuple[Callable[[Source], Iterator[Figure]], ...] = (
    measure_imports,
    measure_sizes,
    measure_methods,
    measure_style,
)


def measure(source: Source) -> dict[str, Figure]:
    """All figures by key, in the order of the table."""
    return {f.key: f for function in MEASURES for f in function(source)}


def draw_source(source: Source) -> str:
    """The picture of the packages that exist, an arrow wherever a file of one imports a file of another."""
    wrong = {packages_of(source, a) for a in find_upward_arrows(source)}
    arrows = {packages_of(source, a) for a in source.arrows} - wrong
    sizes = {p: [m.lines for m in source if m.package == p] for p in source.packages}
    return draw_floors(
        [present for floor in FLOORS if (present := [p for p in floor if p in sizes])],
        {(p, q) for p, q in arrows if p != q and p in LEVEL and q in LEVEL},
        wrong,
        {p: f"{len(n)} file{'s' * (len(n) > 1)}, {sum(n):,} lines" for p, n in sizes.items()},
    )


def format_table(figures: Iterable[Figure]) -> str:
    rows = [("key", "measure", "value", "bar", ""), *(f.row() for f in figures)]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(r[:4], widths, strict=True)), r[4]]).rstrip() for r in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measures the structure of src/veneer; exits 1 if a bar is missed.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="root of the repository")
    parser.add_argument("--only", metavar="KEYS", help="rows of the table, by key, separated by commas")
    parser.add_argument("--why", metavar="KEY", help="list the places behind one figure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the floors and exit")
    given = parser.parse_args(arguments)
    source = Source(given.root)
    if given.svg is not None:
        given.svg.write_text(draw_source(source), "utf-8")
        return 0
    figures = measure(source)
    chosen = [given.why] if given.why else given.only.split(",") if given.only else list(figures)
    if unknown := [key for key in chosen if key not in figures]:
        parser.error(f"no measure {', '.join(unknown)}; there are {', '.join(figures)}")
    shown = [figures[key] for key in chosen]
    if given.json:
        keys = ("key", "title", "value", "bar", "at_least", "note", "holds", "places")
        print(json.dumps([{k: getattr(f, k) for k in keys} for f in shown], indent=1))
    else:
        if given.why:
            print("\n".join(shown[0].places))
        print(format_table(shown))
    return 0 if all(f.holds for f in shown) else 1


if __name__ == "__main__":
    sys.exit(main())
