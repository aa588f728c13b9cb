"""The recipes of examples/tweet_labels, on tiny models: text to label, measured by what is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import words
from veneer.cli.app import app

EXAMPLE = Path(__file__).parents[1] / "examples" / "tweet_labels"


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("tweets")
    words.write_models(folder)
    rows = [json.dumps({"prompt": f"say {w} {i}", "completion": f" {w}"}) for i in range(8) for w in words.WORDS]
    (folder / "train.jsonl").write_text("\n".join(rows[6:]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(rows[:6]) + "\n")
    (folder / "wrong.jsonl").write_text('{"tweet": "say red", "label": "red"}\n' * 20)
    return folder


def run(made: Path, recipe: str, model: str, out: Path, *more: Any) -> Any:
    command = ["train", EXAMPLE / recipe, "--model", made / model, "--data", made / "train.jsonl", "--eval-data",
               made / "test.jsonl", "--out", out, "--eval-every", 0, "--target-modules", "all-linear", *more]  # fmt: skip
    return CliRunner().invoke(app, [str(a) for a in command])


@pytest.mark.parametrize(("recipe", "model"), [("causal.yaml", "causal"), ("seq2seq.yaml", "seq2seq")])
def test_labels_are_learned(made: Path, recipe: str, model: str, tmp_path: Path) -> None:
    result = run(
        made, recipe, model, tmp_path / "out", "--steps", 250, "--learning-rate", 1e-2, "--modules-to-save", "[lm_head]"
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["measured"]["exact_match"]
    assert before < 0.5 and after > 0.9, (before, after, report["samples"])


def test_a_missing_column_is_one_line_and_loses_nothing(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = run(made, "causal.yaml", "causal", tmp_path / "out", "--data", made / "wrong.jsonl")
    said = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == 2 and len(said) == 1 and "Traceback" not in result.output
    assert "has the columns 'tweet', 'label'" in said[0] and "--prompt-column" in said[0]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_real_tweets_become_rows(tmp_path: Path) -> None:
    import runpy
    import sys
    from unittest import mock

    from veneer.files.embedded import cache_folder
    from veneer.recipes.ratings import ARCHIVE

    if not (cache_folder() / "data" / ARCHIVE).is_file():
        pytest.skip("the archive of tweets has not been fetched: veneer train --data tweet-sentiment fetches it")
    with mock.patch.object(sys, "argv", ["make_data.py", str(tmp_path)]):
        runpy.run_path(str(EXAMPLE / "make_data.py"), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 1000 and {r["completion"] for r in rows} == {" positive", " negative"}
    assert all(r["prompt"].startswith("Tweet text : ") and r["prompt"].endswith(" Label :") for r in rows)
