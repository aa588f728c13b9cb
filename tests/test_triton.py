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
from torch import Tensor, nn

from veneer.kernels import gated, linear
from veneer.kernels import triton as kernels

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
    here = importlib.util.find_spec("triton") is not None
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert not kernels.is_available(torch.zeros(1))
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert kernels.is_available(torch.zeros(1)) == here
    assert not kernels.is_available(torch.zeros(1).double())


def test_not_used_where_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def gate(*given: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    starts, device = kernels.group_starts.__wrapped__, torch.device("meta")
    for capability, fits in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(kernels, "gate_forward", lambda *given: None)
        assert starts(device) == fits
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "gate_forward", gate)
    with pytest.warns(UserWarning, match="meta: Triton is installed.*Failed to find C compiler.*needs a C compiler"):
        assert not starts(device)


@pytest.mark.parametrize("K", [64, 50])  # a multiple of a word's bits, and none
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_triton_a_mask_is_packed_on_its_device(dtype: torch.dtype, K: int) -> None:
    """Off the CPU, on a device that every machine has: which operations run, on tensors of which device and shape."""
    with torch.device("meta"):

        def layer(K: int, N: int) -> tuple[Tensor, ...]:  # W, b, A, B, d
            trained = torch.empty(4, K), torch.empty(N, 4), torch.empty(N)
            return torch.empty(N, K, dtype=dtype), torch.empty(N, dtype=dtype), *(t.requires_grad_() for t in trained)

        x = torch.empty(30, K, dtype=dtype, requires_grad=True)
        pairs = [pair for layers in zip(layer(K, 70), layer(K, 70), strict=True) for pair in layers]
        rules = (0.5, 0.5), 0.1, (0.5,), 0.1, dtype
        for masks, function, args in (
            (1, linear.FactoredLinear, (x, (1, (0.5,), 0.1, dtype), *layer(K, 24))),
            (2, gated.GatedLinear, (x, nn.SiLU(), rules, *pairs, *layer(70, K))),
        ):
            made = linear.apply(function, *args)
            y = made[0] if isinstance(made, tuple) else made
            kept = [t for t in y.grad_fn.saved_tensors if t is not None]
            assert [t.dtype for t in kept if not t.is_floating_point()] == [torch.int16] * masks
            leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
            found = torch.autograd.grad(y.sum(), leaves)
            assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in leaves]
            assert all(t.is_meta for t in (y, *kept, *found))


def test_triton_is_imported_by_the_first_call_only() -> None:
    code = "import sys, veneer, veneer.kernels.triton as k; import torch; k.is_available(torch.zeros(1)); print('triton' in sys.modules)"
    assert run(["-c", code]).strip() == "False"
