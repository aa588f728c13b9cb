"""The support page is that of the rows which the tests have now."""

from __future__ import annotations

from pathlib import Path

from backends import FORMATS
from support import FAILED, PASSED, TITLE, page, parsed
from table import LAYERS, METHODS
from test_backends import CELLS as ON_FORMATS
from test_table import CELLS as ON_LAYERS

PAGE = Path(__file__).parents[1] / "docs/support.md"
AGAIN = "run `make support`"


def test_page_has_the_rows_and_columns_of_the_tests() -> None:
    text = PAGE.read_text("utf-8")
    assert text.startswith(TITLE)
    formats, storage, layers = parsed(text)
    assert formats[0] == [n for n, f in FORMATS.items() if f.runs], AGAIN
    assert [r[0] for r in formats[1]] == [m for m in METHODS if m != "tokens"], AGAIN
    assert [r[0] for r in storage[1]] == [*FORMATS, "mxfp4"], AGAIN
    assert layers[0] == list(LAYERS) and [r[0] for r in layers[1]] == list(METHODS), AGAIN


def test_every_tested_cell_is_filled_and_none_failed() -> None:
    formats, _, layers = parsed(PAGE.read_text("utf-8"))
    for (columns, rows), tested in ((formats, ON_FORMATS), (layers, ON_LAYERS)):
        shown = {(r[0], c): v for r in rows for c, v in zip(columns, r[1:], strict=True)}
        assert FAILED not in shown.values()
        assert all(shown[cell].startswith(PASSED) for cell in tested), AGAIN


def test_a_failed_test_is_seen() -> None:
    text = page({("lora", "linear"): {"failed", "test_save_load"}}, {("lora", "GPTQ"): {"test_merge"}})
    formats, _, layers = parsed(text)
    assert layers[1][0][1 + layers[0].index("linear")] == FAILED
    assert formats[1][0][1 + formats[0].index("GPTQ")] == "yes, dense"
