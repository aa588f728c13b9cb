"""The examples' own recipes, on tiny models that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_cli import SMALL, made, veneer  # noqa: F401
from veneer.cli.models import locate

EXAMPLES = Path(__file__).parents[1] / "examples"
OPT, T0 = EXAMPLES / "opt_int8" / "recipe.yaml", EXAMPLES / "t0_3b_zero3_offload" / "recipe.yaml"
QUICK = [*SMALL, "--dtype", "float32", "--warmup", 0, "--samples", 1, "--gradient-accumulation", 1]


def reported(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_opt_in_few_bits(storage: str, made: Path, tmp_path: Path) -> None:  # noqa: F811
    out, data = tmp_path / "run", made / "pairs.jsonl"
    more = ["--quantize", storage, "--steps", 20, "--learning-rate", "2e-2"]
    veneer("train", OPT, "--model", made / "opt", "--data", data, "--out", out, *QUICK, *more)
    report = reported(out)
    assert report["loss_after"] < report["loss_before"]
    assert report["model_bytes"] < (made / "opt" / "model.safetensors").stat().st_size
    # The adapter is for the plain base too.
    veneer("generate", made / "opt", "--adapter", out, "-p", "say red 1", "--max-new-tokens", 2)


def test_t0_in_one_process(made: Path, tmp_path: Path) -> None:  # noqa: F811
    where = ("--model", made / "seq2seq", "--data", made / "pairs.jsonl", "--out", tmp_path / "run")
    veneer("train", T0, *where, *QUICK, "--steps", 20, "--learning-rate", "2e-2")
    report = reported(tmp_path / "run")
    assert report["loss_after"] < report["loss_before"]


def test_the_tweets_are_what_the_recipe_wants() -> None:
    rows = [json.loads(line) for line in (T0.parent / "complaints.jsonl").read_text().splitlines()]
    assert {r["completion"] for r in rows} == {"complaint", "no complaint"} and all(r["prompt"] for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_smollm2_in_few_bits(storage: str, tmp_path: Path) -> None:
    locate("smollm2-135m")
    more = ["--quantize", storage, "--dtype", "float32", "--steps", 20, "--warmup", 2, "--gradient-accumulation", 1]
    veneer("train", OPT, "--model", "smollm2-135m", "--out", tmp_path / "run", *more, "--learning-rate", "2e-3")
    report = reported(tmp_path / "run")
    assert report["loss_after"] < report["loss_before"] - 1
