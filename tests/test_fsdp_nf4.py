"""QLoRA on FSDP2: two real gloo processes that split packed weights train as one process does, and save its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from test_processes import HERE, free_port, run

METHODS = ["lora", "dora", "ia3", "prefix", "bottleneck"]


def step(label: str, folder: Path, storage: str, how: str, names: list[str]) -> dict[str, Any]:
    start = [sys.executable]
    if how != "single":
        start += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    run([*start, str(HERE / "fsdp_nf4_step.py"), label, str(folder), storage, how, *names], limit=90)
    found: dict[str, Any] = json.loads((folder / f"{label}.json").read_text())
    return found


@pytest.mark.parametrize(
    ("storage", "how"), [("float32", "block"), pytest.param("uint8", "block", marks=pytest.mark.slow),
                         pytest.param("bfloat16", "layers", marks=pytest.mark.slow)],
)  # fmt: skip
def test_every_method_trains_as_in_one_process(storage: str, how: str, tmp_path: Path) -> None:
    wanted = step("one", tmp_path, storage, "single", METHODS)
    found = step("two", tmp_path, storage, how, METHODS)
    for name in METHODS:
        assert isinstance(found[name], list), f"{name}:\n{found[name]}"
        assert found[name] == pytest.approx(wanted[name], abs=1e-4), name
        one, two = (load_file(tmp_path / where / name / "adapter_model.safetensors") for where in ("one", "two"))
        assert one.keys() == two.keys() and one
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=0, msg=f"{name} {key}")


def test_rounded_entries_are_refused(tmp_path: Path) -> None:
    found = step("mixed", tmp_path, "float32", "mixed", ["lora"])
    assert "bnb_4bit_quant_storage=torch.uint8" in found["lora"] and "q_proj" in found["lora"]


def test_a_split_int8_weight_is_refused() -> None:
    import bitsandbytes as bnb

    from veneer.backends.bnb import EightBit

    layer = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    EightBit().gathered(layer, "weight")  # the library's own
    layer._parameters["weight"] = torch.nn.Parameter(layer.weight.data, requires_grad=False)  # as fully_shard leaves it
    with pytest.raises(RuntimeError, match=r"split the int8 weight of a Linear8bitLt.*ignored_params"):
        EightBit().gathered(layer, "weight")
