"""One of the processes of tests/test_fsdp_nf4.py: methods on a base in nf4, and what came of it as JSON.

python -m torch.distributed.run --nproc_per_node 2 fsdp_nf4_step.py NAME FOLDER STORAGE SHARDED [METHOD ...]
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from processes_step import METHODS, VOCABULARY, plain
from veneer.kernels import linear
from veneer.recipes.launch import leave_process

SIZES = {
    "uint8": (34, 51),
    "float32": (36, 50),
    "bfloat16": (36, 51),
}  # down_proj packs into an odd number of entries: uneven shards


def in_nf4(model: nn.Module, storage: torch.dtype, nested: bool = True) -> nn.Module:
    """The linear layers of a model's blocks in nf4, with double quantization."""
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                                         compress_statistics=nested, quant_storage=storage)  # fmt: skip
                made.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", compress_statistics=nested,
                                                quant_storage=storage, module=made)  # fmt: skip
                block.set_submodule(name, made.to("cpu"))
    return model


def dense(storage: str) -> nn.Module:
    hidden, inner = SIZES[storage]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=2,
            head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_implementation="eager",
        )  # fmt: skip
    )


def make(name: str, storage: str) -> nn.Module:
    """A tiny Llama in nf4 with one method, the same in every process."""
    base = in_nf4(dense(storage), getattr(torch, storage))
    torch.manual_seed(1)
    return veneer.get_peft_model(base, METHODS[name]())


def shard(model: nn.Module, *, layers: bool, mixed: bool) -> None:
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if mixed else {}
    for block in model.get_base_model().model.layers:
        if layers:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    fully_shard(module, **options)
        fully_shard(block, **options)
    fully_shard(model, **options)


def main(label: str, folder: Path, storage: str, how: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    linear.SMALL = 0  # the functions that large inputs take
    if how != "single":
        dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names:
        try:
            model = make(name, storage)
            if how != "single":
                shard(model, layers="layers" in how, mixed="mixed" in how)
            losses = plain(model, model)
            model.save_pretrained(folder / label / name)
            found[name] = losses
        except Exception:
            found[name] = traceback.format_exc()
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / f"{label}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        leave_process()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
