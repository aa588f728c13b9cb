"""Writes what docs/architecture.md shows of the code: the floors as a picture, the packages, three walks through them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from floors import FLOORS
from source_tree import Source
from structure import draw_source
from walks import WALKS, describe_walk

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "docs/images/floors.svg"


def describe_packages() -> str:
    """One line a package, from the top floor down: the first paragraph of its docstring."""
    lines = []
    for floor in FLOORS:
        for package in floor:
            tree = ast.parse((ROOT / "src/veneer" / package / "__init__.py").read_text())
            first = (ast.get_docstring(tree) or "").split("\n\n")[0]
            lines.append(f"- **{package}/** {' '.join(first.split())}")
    return "\n".join(lines)


def escape_template(text: str) -> str:
    """Text that `re.sub` inserts as it is."""
    return text.replace("\\", r"\\")


def fill_page(text: str) -> str:
    """The page with its generated parts, which stand between comments that name them, made anew."""
    parts = {"packages": describe_packages()} | {w: f"```text\n{describe_walk(w)}\n```" for w in WALKS}
    for name, made in parts.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(rf"\g<1>{escape_template(made)}\n\g<2>", text)
        if count != 1:
            raise ValueError(
                f"{PAGE}: must have the comments <!-- {name} --> and <!-- /{name} --> once, has {count} pairs"
            )
    return text


if __name__ == "__main__":
    PICTURE.write_text(draw_source(Source(ROOT)))
    PAGE.write_text(fill_page(PAGE.read_text()))
