"""transformers' tensor parallelism on two real processes: adapters train, save, load and merge as on one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tensor_parallel_step import CASES
from test_processes import HERE, free_port, run


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("split")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    run([*start, str(HERE / "tensor_parallel_step.py"), str(folder)], limit=180)
    return folder, json.loads((folder / "found.json").read_text())


# Two processes add float32 products in another order: 2^-24 a sum of some hundred terms, through two layers, is about 1e-6
# of the logits. Adam divides by the gradient's size, so small gradients' rounding grows while the adapters are trained.
LOSSES, LOGITS, WEIGHTS = 1e-4, 1e-4, 1e-3


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_split_layers_are_those_of_whole_ones(name: str, found: tuple[Path, dict[str, Any]]) -> None:
    folder, all_found = found
    one = all_found[name]
    assert isinstance(one, dict), one
    assert one["split"] == pytest.approx(one["alone"], rel=LOSSES)
    assert one["same words"]
    for what, difference in one["differences"].items():
        assert difference <= (0 if what == "unmerged" else LOGITS), what
    a, b = (load_file(folder / how / name / "adapter_model.safetensors") for how in ("alone", "split"))
    assert a.keys() == b.keys()
    for key in a:
        assert (b[key] - a[key]).norm() <= WEIGHTS * a[key].norm(), key


def test_factors_are_split_with_the_weight(found: tuple[Path, dict[str, Any]]) -> None:
    """B of a layer split by its outputs, A of one split by its inputs; the other factor is whole."""
    places = {n.partition("layers.0.")[2]: p for n, p in found[1]["lora"]["placements"].items() if "layers.0." in n}
    assert places["self_attn.q_proj.lora_A:default"] == "R" and places["self_attn.q_proj.lora_B:default"] == "S(0)"
    assert places["mlp.down_proj.lora_A:default"] == "S(1)" and places["mlp.down_proj.lora_B:default"] == "R"


def test_copies_of_split_modules_are_refused(found: tuple[Path, dict[str, Any]]) -> None:
    assert "lm_head" in found[1]["refused"] and "tensor parallelism" in found[1]["refused"]
