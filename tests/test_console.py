"""What a command prints is ours: libraries' messages about themselves stay off the console, all others get there."""

from __future__ import annotations

import enum
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from test_cli import made  # noqa: F401  (a fixture)
from veneer.interop import console

OURS = (
    r".*: \d+ rows to train on, \d+ held out; adapter [A-Z]+",
    r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: [\d.]+",
    r"(step \d+ of \d+|training ━+) .*(loss|held-out) [\d.]+",
    r"report",
    r"[┏┡└┌├╇┃│].*[┓┩┘┐┤┃│]",  # tables
    r"adapter, metrics\.jsonl, loss\.png and report\.md are in.*",
    r"/\S*",  # the folder, on a line of its own if it is long
)
# DDP's C++ code prints it past Python's logging and warnings: Trainer lets DDP look for parameters without a gradient, which
# some methods have, and this run has none.
OF_DDP = (
    r"\[rank\d+\]:\[W\S* \S* reducer\.cpp:\d+\] Warning: find_unused_parameters=True was specified in DDP constructor.*"
)


def foreign_lines(text: str, *allowed: str) -> list[str]:
    """The lines of a training's output that are none of ours."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if line and not any(re.fullmatch(p, line) for p in (*OURS, *allowed))]


def test_a_training_prints_nothing_foreign(made: Path, tmp_path: Path) -> None:  # noqa: F811
    unset = ("DS_ACCELERATOR", "PYTHONWARNINGS", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES")
    kept = {k: v for k, v in os.environ.items() if k not in unset}
    # A cache of its own, so that the data are read anew.
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
    source = {"PYTHONPATH": str(Path(veneer.__file__).parents[1])}
    data = ["--model", str(made / "causal"), "--data", str(made / "pairs.jsonl"), "--out", str(tmp_path / "run")]
    small = ["--batch-size", "4", "--steps", "2", "--held-out", "8", "--samples", "1", "--r", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "veneer", "train", *data, *small], env={**kept, **own, **source},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "held-out loss" in done.stdout
    assert foreign_lines(done.stdout) == []


class OfTorchao(enum.Enum):
    """Stands for one of torchao's."""

    A = 1


OfTorchao.__module__ = "torchao.quantization"
PYTREE = "%s is an Enum subclass and is now natively supported by torch.compile as an opaque value type."
AO = "Failed to load /lib/torchao/_C_x.abi3.so: Could not load this library: /lib/torchao/_C_x.abi3.so"
BNB = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure"


@pytest.mark.parametrize(
    ("logger", "message", "arguments", "cuda", "shown"),
    [
        ("torchao", AO, (), None, False),
        ("torchao", AO, (), "13.0", True),  # CUDA kernels that torch for CUDA cannot load
        ("torchao", "Failed to load config: x", (), None, True),
        ("torch.utils._pytree", PYTREE, (OfTorchao,), None, False),
        ("torch.utils._pytree", PYTREE, (enum.Enum,), None, True),  # a user's own
        ("torch.utils._pytree", "%s is strange", (OfTorchao,), None, True),
        ("bitsandbytes.backends.cpu.ops", BNB, (ModuleNotFoundError("No module named 'kernels'"),), None, False),
        ("bitsandbytes.backends.cpu.ops", BNB, (OSError("no network"),), None, True),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were", (), None, False),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were", (), "13.0", True),
        ("DeepSpeed", "something else", (), None, True),
    ],
)
def test_only_known_messages_are_kept_quiet(
    logger: str,
    message: str,
    arguments: tuple[Any, ...],
    cuda: str | None,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: cuda is not None)
    console.quiet_libraries()
    before = len(logging.getLogger(logger).filters)
    console.quiet_libraries()
    emits = logging.getLogger(logger)
    assert len(emits.filters) == before
    record = emits.makeRecord(logger, logging.WARNING, "", 0, message, arguments, None)
    assert bool(emits.filter(record)) is shown
