"""The floors of src/veneer, and the rules about the imports between its packages."""

from __future__ import annotations

import ast
import re

from source_tree import PACKAGE, Arrow, Source, group_circular

# DESIGN.md, section 2, from the top. A package imports packages of lower floors, and of its own floor if that closes no
# circle. The files flat in the package are on no floor: `__init__` is the public face and may import every package; the
# rule against circles keeps those packages from importing the face.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "ui"),
    ("recipes",),
    ("checks",),
    ("peft", "planning"),
    ("model",),
    ("export", "serving", "interop"),
    ("training", "files"),
    ("lifecycle",),
    ("kernels", "prompts"),
    ("injection",),
    ("methods",),
    ("layers",),
    ("targets",),
    ("backends", "io"),
    ("algebra", "distributed"),
)
LEVEL = {package: -n for n, floor in enumerate(FLOORS) for package in floor}
# The bars for the core are stricter. Flat files count as core, so that none escapes by lying outside all packages.
OUTSIDE_CORE = frozenset({"cli", "ui", "recipes", "checks", "peft", "planning", "export", "serving", "interop"})
CORE = frozenset(LEVEL) - OUTSIDE_CORE | {""}


def find_circles(source: Source) -> list[list[str]]:
    """Groups of files that import one another in a circle, the largest first."""
    graph: dict[str, list[str]] = {name: [] for name in source.modules}
    for arrow in source.arrows:
        graph[arrow.source].append(arrow.target)
    circles = [sorted(group) for group in group_circular(graph) if len(group) > 1]
    return sorted(circles, key=lambda c: (-len(c), c))


def find_upward_arrows(source: Source) -> list[Arrow]:
    """Imports of a package on a higher floor, and those that close a circle of packages on one floor."""
    between = [(a, *packages_of(source, a)) for a in source.arrows]
    between = [(a, p, q) for a, p, q in between if p != q and p in LEVEL and q in LEVEL]
    graph: dict[str, set[str]] = {p: {q for _, o, q in between if o == p and LEVEL[p] == LEVEL[q]} for p in LEVEL}
    group_of = {p: n for n, group in enumerate(group_circular(graph)) for p in group}
    return [a for a, p, q in between if LEVEL[p] < LEVEL[q] or (LEVEL[p] == LEVEL[q] and group_of[p] == group_of[q])]


def find_misplaced_packages(source: Source) -> list[str]:
    """Packages that are on no floor."""
    return [p for p in source.packages if p not in LEVEL]


def find_silent_packages(source: Source) -> list[str]:
    """Packages whose `__init__` docstring does not say what they may import, or names one that is above them.

    The sentence has the word "import" and names packages, or says "nothing", "everything" or "any".
    """
    found = []
    for package in source.packages:
        init = source.modules.get(f"{PACKAGE}.{package}")
        text = "" if init is None else ast.get_docstring(init.tree) or ""
        clause = next((s for s in re.split(r"[.;:]\s", text) if re.search(r"\bimports?\b", s)), None)
        if clause is None:
            found.append(f"{package}/__init__.py: the docstring does not say what the package may import")
            continue
        named = {w for w in re.findall(r"\w+", clause) if w in LEVEL and w != package}
        above = sorted(p for p in named if package in LEVEL and LEVEL[p] > LEVEL[package])
        if above:
            found.append(
                f"{package}/__init__.py: says that it may import {', '.join(above)}, which is on a higher floor"
            )
        elif not named and not re.search(r"\b(nothing|everything|any)\b", clause):
            found.append(f"{package}/__init__.py: names no package that it may import")
    return found


def packages_of(source: Source, arrow: Arrow) -> tuple[str, str]:
    """The packages of an import's two files."""
    return source.modules[arrow.source].package, source.modules[arrow.target].package
