"""One of the two processes of tests/test_training_words.py: COFT's constraint under FSDP2 and ZeRO, and what cannot act.

python -m torch.distributed.run --nproc_per_node 2 training_words_step.py LAYOUT FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
import torch.distributed as dist
from torch import nn

import veneer
from processes_step import base, batches, own_rows, zero_config
from veneer.files.state_dict import get_peft_model_state_dict
from veneer.recipes.launch import leave_process

EPS = 1e-3


def adapted() -> Any:
    return veneer.get_peft_model(
        base(), veneer.OFTConfig(oft_block_size=4, coft=True, eps=EPS, target_modules=["q_proj", "v_proj"])
    )


def largest(state: dict[str, Any]) -> float:
    """The largest norm of a block's Q times the square root of the number of blocks."""
    tensors = [t for k, t in state.items() if k.endswith("oft_R.weight")]
    return max(float((2 * t.float().square().sum(1)).sqrt().max()) * t.shape[0] ** 0.5 for t in tensors)


def fsdp(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for ids in batches()[:3]:
        rows = own_rows(ids)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def zero(model: nn.Module, stage: int, n: int = 3) -> None:
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(parameters, lr=1.0),
        config=zero_config(stage) | {"zero_allow_untested_optimizer": True},
    )[0]  # fmt: skip
    for ids in batches()[:n]:
        rows = own_rows(ids)
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()


def fused() -> Any:
    model = veneer.get_peft_model(base(), veneer.BottleneckConfig(width=4))
    model.add_adapter("second", veneer.BottleneckConfig(width=4))
    model.add_adapter("fusion", veneer.AdapterFusionConfig(adapter_names=["default", "second"]))
    model.set_adapter("fusion")
    model.set_requires_grad(["default", "second"], False)
    return model


def main(layout: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = adapted()
    found: dict[str, Any] = {}
    if layout == "fsdp2":
        fsdp(model)
    else:
        zero(model, int(layout[-1]))
    found["largest"] = largest(get_peft_model_state_dict(model))
    found["saved"] = largest(get_peft_model_state_dict(model))
    if layout != "fsdp2":
        try:
            zero(fused(), int(layout[-1]), 1)
            found["refused"] = "no"
        except RuntimeError as error:
            found["refused"] = str(error)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    leave_process()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
