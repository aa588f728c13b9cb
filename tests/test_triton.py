"""The Triton kernels, each way in a process of its own: triton reads its environment when it is imported, and other
tests import it through torch.compile."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
installed = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton==3.7.1"
)


def run(command: list[str], **variables: str) -> str:
    path = [str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(said: str) -> int:
    assert "skipped" not in said
    found = re.search(r"(\d+) passed", said)
    return int(found[1]) if found else 0


CASES = ["-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(HERE / "triton_cases.py")]


@installed
def test_in_the_interpreter() -> None:
    assert passed(run(CASES, TRITON_INTERPRET="1")) > 100


@installed
def test_compiled_without_a_gpu(tmp_path: Path) -> None:
    said = run([str(HERE / "triton_compile.py"), "90"], TRITON_CACHE_DIR=str(tmp_path))
    assert said.count("sm_90") == 20


@installed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    assert passed(run(CASES)) > 100


def test_not_used_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.kernels import triton as kernels

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.available(torch.zeros(1)) == (importlib.util.find_spec("triton") is not None)


def test_triton_is_imported_by_the_first_call_only() -> None:
    code = "import sys, veneer, veneer.kernels.triton as k; import torch; k.available(torch.zeros(1)); print('triton' in sys.modules)"
    assert run(["-c", code]).strip() == "False"
