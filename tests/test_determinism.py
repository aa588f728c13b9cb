"""Seed in, same adapter out: bit for bit, whatever is measured and shown on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from test_cli import made  # noqa: F401
from veneer.cli.app import app

TASKS = {
    "causal": ("causal", "pairs.jsonl", "causal-lm", "all-linear"),
    "classifier": ("classifier", "labelled.csv", "classification", "[query,value]"),
}
QUIET = {"eval-every": 0, "save-every": 0, "log-every": 5, "samples": 0}
# What must make no difference.
WAYS: dict[str, dict[str, Any]] = {
    "measured often": {"eval-every": 2},
    "logged, saved and shown": {"log-every": 1, "save-every": 2, "samples": 2},
    "unwatched": {"no-watch": None},
    "checkpointed": {"gradient-checkpointing": None},
}


def flags(source: Path, task: str, out: Path, **options: Any) -> list[str]:
    model, data, kind, targets = TASKS[task]
    given = {"model": source / model, "data": source / data, "task": kind, "target-modules": targets, "out": out, "held-out": 8,
             "batch-size": 4, "steps": 5, "learning-rate": "1e-2", "lora-dropout": 0.2, **QUIET, **options}  # fmt: skip
    return ["train", *(str(x) for k, v in given.items() for x in ([f"--{k}"] if v is None else [f"--{k}", v]))]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def train(source: Path, task: str, **options: Any) -> bytes:
    with tempfile.TemporaryDirectory() as where:
        done = CliRunner().invoke(app, flags(source, task, Path(where) / "run", **options))
        assert done.exit_code == 0, done.output + repr(done.exception)
        return adapter(Path(where) / "run")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_measured_and_shown_changes_nothing(task: str, made: Path) -> None:  # noqa: F811
    plain = train(made, task)
    assert {name: train(made, task, **options) == plain for name, options in WAYS.items()} == dict.fromkeys(WAYS, True)
    assert train(made, task, seed=1) != plain


@pytest.fixture(scope="module")
def wider(made: Path, tmp_path_factory: Any) -> Path:  # noqa: F811
    """A folder with a model wide enough that torch splits its work among threads."""
    folder: Path = tmp_path_factory.mktemp("wider")
    tokenizer = AutoTokenizer.from_pretrained(made / "causal")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=0)
    ).save_pretrained(folder / "causal")
    tokenizer.save_pretrained(folder / "causal")
    (folder / "pairs.jsonl").write_bytes((made / "pairs.jsonl").read_bytes())
    return folder


def in_a_process(folder: Path, out: Path, threads: int) -> subprocess.Popen[bytes]:
    """Training in a process of its own, whose hashes are seeded anew."""
    known = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}
    environment = {**known, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "veneer", *flags(folder, "causal", out, **{"batch-size": 16, "log-every": 1})]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def losses(folder: Path) -> list[float]:
    return [
        x["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (x := json.loads(line))
    ]


def finished(process: subprocess.Popen[bytes]) -> None:
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said.decode()


def here(folder: Path, out: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        done = CliRunner().invoke(app, flags(folder, "causal", out, **{"batch-size": 16, "log-every": 1}))
        assert done.exit_code == 0, done.output
    finally:
        torch.set_num_threads(before)


def same_bits(one: Path, other: Path) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl")
    return all((one / n).read_bytes() == (other / n).read_bytes() for n in names)


def apart(one: Path, other: Path) -> float:
    """The distance of two adapters, relative to what they hold."""
    first, second = (load_file(p / "adapter_model.safetensors") for p in (one, other))
    distance = sum(float((first[k] - second[k]).square().sum()) for k in first)
    return float((distance / sum(float(t.square().sum()) for t in first.values())) ** 0.5)


def test_another_process_gives_the_same_bits(wider: Path, tmp_path: Path) -> None:
    """And another number of threads the same losses, though sums are made in another order."""
    finished(in_a_process(wider, tmp_path / "there", 1))
    for threads in (1, 2):
        here(wider, tmp_path / str(threads), threads)
    assert same_bits(tmp_path / "there", tmp_path / "1")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5, rel=1e-6)
    assert apart(tmp_path / "1", tmp_path / "2") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_give_the_same_bits(threads: int, wider: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        finished(in_a_process(wider, tmp_path / name, threads))
    assert same_bits(tmp_path / "a", tmp_path / "b")
