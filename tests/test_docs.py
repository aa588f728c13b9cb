"""Every registered method's page says all there is to say: each field, the paper, what training uses."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest

from veneer.cli.app import COMMON
from veneer.methods.base import Method
from veneer.methods.registry import METHODS  # type: ignore[attr-defined]
from veneer.recipes.describe_method import describe_method, read_args
from veneer.recipes.recipe import build_run
from veneer.recipes.run import FIELDS, PLAIN, Run

ROOT = Path(__file__).parents[1]


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = hooks().pages()


@pytest.mark.parametrize("name", METHODS)
def test_page(name: str) -> None:
    cls, page = METHODS[name], PAGES[f"methods/{name.lower()}.md"]
    fields = {f.name for f in dataclasses.fields(cls) if f.init} - set(COMMON)
    docs = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in cls.__mro__ if base not in Method.__mro__]
    texts = {name: text for doc in reversed(docs) for name, text in read_args(doc.splitlines()).items()}
    assert set(texts) == fields, "fields without a text, or texts without a field"
    assert all(texts.values())
    assert all(f"\n| `{f}` |" in page for f in fields)
    assert f"peft_type: {name}" in page and f"--method {name.lower()} " in page and cls.__name__ in page
    found = describe_method(cls)
    assert len(found.summary) <= 100
    # Rows of an embedding, taught as they are, have no paper.
    assert name == "TRAINABLE_TOKENS" or (found.references and "](https://arxiv.org/abs/" in page and found.paper)


@pytest.mark.parametrize("name", METHODS)
def test_training_defaults(name: str) -> None:
    """Of a run, or of the config; the user's own value wins."""
    cls = METHODS[name]
    given = {"model": "m", "data": "d", "method": name.lower()}
    keys = {f.name for f in FIELDS} | {f.name for f in dataclasses.fields(cls)}
    assert set(cls.recipe) <= keys and not {"model", "data", "method", "name"} & set(cls.recipe)
    run = build_run(given, {})
    for key, value in {**PLAIN, **cls.recipe}.items():
        assert (run.method[key] if key in run.method else getattr(run, key)) == value
    own = build_run({**given, "learning_rate": 7e-4}, {"warmup": "3"})
    assert (own.learning_rate, own.warmup) == (7e-4, 3)
    for key in set(cls.recipe) - {f.name for f in FIELDS}:
        plain = getattr(cls(), key)
        assert build_run({**given, "method": {"name": name.lower(), key: plain}}, {}).method[key] == plain


def test_navigation() -> None:
    decisions = {p.name for p in (ROOT / "docs/decisions").glob("*.md")}
    assert "README.md" in decisions
    assert set(PAGES) == {"methods/index.md", *(f"methods/{n.lower()}.md" for n in METHODS)}
    assert isinstance(Run(model="m", data="d").learning_rate, float)


def test_architecture_is_current() -> None:
    """`make architecture` was run: the packages, the picture and the walks are those of the code."""
    import re
    import subprocess
    import sys

    import architecture
    from source_tree import Source
    from structure import draw_source

    def without_sizes(picture: str) -> str:
        return re.sub(r"[\d,]+ files?, [\d,]+ lines", "", picture)

    page = architecture.PAGE.read_text()
    assert architecture.describe_packages() in page
    assert without_sizes(architecture.PICTURE.read_text()) == without_sizes(draw_source(Source(ROOT)))
    # In a process of its own, as what other tests imported changes which backends are asked.
    done = subprocess.run(
        [sys.executable, "tools/walks.py", "tensor", "attach"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    walks = [part.partition("\n")[2].strip() for part in done.stdout.split("# ") if part]
    assert len(walks) == 2 and all(walk in page for walk in walks)


def test_public_names_are_current() -> None:
    """`make architecture` writes them anew."""
    import runpy

    made = runpy.run_path(str(ROOT / "tools" / "public_names.py"))
    assert made["STUB"].read_text("utf-8") == made["make_stub"]()
