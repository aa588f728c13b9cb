"""One of the processes of tests/test_tensor_parallel.py: every method on a model that `tp_plan="auto"` splits.

python -m torch.distributed.run --nproc_per_node 2 tensor_parallel_step.py FOLDER
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import veneer
from processes_step import EVERY, METHODS, TASK, base, batches, trained
from veneer.kernels import linear
from veneer.recipes.launch import leave_process

CASES: dict[str, Any] = {
    **{name: make for name, make in METHODS.items() if name != "saved"},
    "all-linear": lambda: veneer.LoraConfig(r=4, target_modules="all-linear", bias="all"),
    "embedding": lambda: veneer.LoraConfig(r=4, target_modules=[*EVERY, "embed_tokens"]),
    "loha": lambda: veneer.LoHaConfig(r=4, target_modules=EVERY),
    "prompt": lambda: veneer.PromptTuningConfig(num_virtual_tokens=4, task_type=TASK),
}


def train(model: nn.Module) -> list[float]:
    """Losses of one batch after another, the same in every process."""
    optimizer, losses = torch.optim.AdamW(trained(model), lr=1e-2), []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def says(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0]).logits


def case(name: str, folder: Path) -> dict[str, Any]:
    """The same training alone and split: losses, logits with and without the adapter, merged, loaded, generated."""
    torch.manual_seed(1)
    alone = veneer.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), CASES[name]())
    found: dict[str, Any] = {"alone": train(alone)}
    if dist.get_rank() == 0:
        alone.save_pretrained(folder / "alone" / name)
    torch.manual_seed(1)
    split = LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
    model = veneer.get_peft_model(split, CASES[name]())
    found["split"] = train(model)
    model.save_pretrained(folder / "split" / name)
    dist.barrier()
    found["placements"] = {
        n: str(p.placements[0]) for n, p in model.named_parameters() if ":" in n and isinstance(p, DTensor)
    }
    for m in (alone, model):
        m.eval()
    differences = {"forward": says(model) - says(alone)}
    with model.disable_adapter(), alone.disable_adapter():
        differences["disabled"] = says(model) - says(alone)
    words = [m.generate(input_ids=batches()[0], max_new_tokens=4, do_sample=False) for m in (model, alone)]
    found["same words"] = torch.equal(*words)
    again = veneer.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto"), folder / "alone" / name
    )
    differences["loaded"] = says(again.eval()) - says(alone)
    if name not in ("prefix", "prompt", "bottleneck"):
        before = says(model)
        model.merge_adapter()
        differences["merged"] = says(model) - before
        model.unmerge_adapter()
        differences["unmerged"] = says(model) - before
    size = says(alone).abs().max()  # of the logits; differences are relative to it
    found["differences"] = {k: float(d.abs().max() / size) for k, d in differences.items()}
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    linear.SMALL = 0  # the functions that large inputs take
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        base().save_pretrained(folder / "base")
    dist.barrier()
    found: dict[str, Any] = {}
    for name in CASES:
        try:
            found[name] = case(name, folder)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other process may wait for this one
    split = LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
    try:
        veneer.get_peft_model(split, veneer.LoraConfig(target_modules=EVERY, modules_to_save=["lm_head"]))
    except ValueError as error:
        found["refused"] = str(error)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    leave_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
