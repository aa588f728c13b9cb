"""The example of Ray Train: two local workers run a recipe unchanged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_cli import made, veneer  # noqa: F401

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_train" / "train.py"
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one_process(made: Path, tmp_path: Path) -> None:  # noqa: F811
    flags = {"model": made / "causal", "data": made / "pairs.jsonl", "batch-size": 4, "steps": 6, "samples": 0,
             "held-out": 8, "eval-every": 0, "save-every": 0}  # fmt: skip
    given = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
    veneer("train", "demo-en-es", *given, "--out", tmp_path / "one")
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # Ray's sockets have paths of 107 bytes at most
        command = [sys.executable, str(EXAMPLE), "demo-en-es", "--workers", "2", "--storage", str(tmp_path / "storage")]
        command += ["--out", str(tmp_path / "two"), *given]
        process = subprocess.Popen(
            command, env={**ENVIRONMENT, "RAY_TMPDIR": short}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=180)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out[-3000:]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and one
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0, msg=key)
    a, b = (json.loads((tmp_path / name / "report.json").read_text())["loss_after"] for name in ("one", "two"))
    assert abs(a - b) < 1e-4
