"""The examples' own recipes, on tiny models that are made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from small import deviation
from test_cli import SMALL, made, veneer  # noqa: F401
from veneer.recipes.models import find_model

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
    # The adapter is for the base in any storage.
    for more in ([], ["--quantize", storage]):
        veneer("generate", made / "opt", "--adapter", out, "-p", "say red 1", "--max-new-tokens", 2, *more)


def test_t0_in_one_process(made: Path, tmp_path: Path) -> None:  # noqa: F811
    where = ("--model", made / "seq2seq", "--data", made / "pairs.jsonl", "--out", tmp_path / "run")
    veneer("train", T0, *where, *QUICK, "--steps", 20, "--learning-rate", "2e-2")
    report = reported(tmp_path / "run")
    assert report["loss_after"] < report["loss_before"]


@pytest.mark.slow
def test_t0_on_two_processes_in_host_memory(made: Path, tmp_path: Path) -> None:  # noqa: F811
    """The example's own command: ZeRO-3 with host memory; the adapter is that of one process."""
    base = shutil.copytree(made / "seq2seq", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "dropout_rate": 0.0}))  # drawn by each process for itself
    where = ["--model", base, "--data", made / "pairs.jsonl", *QUICK, "--lora-dropout", 0]
    for out, more in (("one", []), ("two", ["--processes", 2, "--launch", "zero3-offload"])):
        command = [sys.executable, "-m", "veneer", "train", T0, *where, "--out", tmp_path / out, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(c) for c in command], env=environment, timeout=300, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() and one
    for key, tensor in one.items():
        assert deviation(tensor, two[key]) <= 1e-5, key
    assert abs(reported(tmp_path / "one")["loss_after"] - reported(tmp_path / "two")["loss_after"]) < 1e-4


def test_the_tweets_are_what_the_recipe_wants() -> None:
    rows = [json.loads(line) for line in (T0.parent / "complaints.jsonl").read_text().splitlines()]
    assert {r["completion"] for r in rows} == {"complaint", "no complaint"} and all(r["prompt"] for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_smollm2_in_few_bits(storage: str, tmp_path: Path) -> None:
    find_model("smollm2-135m")
    more = ["--quantize", storage, "--dtype", "float32", "--steps", 20, "--warmup", 2, "--gradient-accumulation", 1]
    veneer("train", OPT, "--model", "smollm2-135m", "--out", tmp_path / "run", *more, "--learning-rate", "2e-3")
    report = reported(tmp_path / "run")
    assert report["loss_after"] < report["loss_before"] - 1
