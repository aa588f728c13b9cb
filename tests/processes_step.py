"""One of the processes of tests/test_processes.py: every method in one layout, and what came of it as JSON.

python -m torch.distributed.run --nproc_per_node 2 processes_step.py LAYOUT FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.distributed import sharding
from veneer.kernels import linear
from veneer.recipes.launch import leave_process

STEPS, ROWS, LENGTH, VOCABULARY = 20, 4, 12, 64
TASK = "CAUSAL_LM"
EVERY = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Any] = {
    "lora": lambda: veneer.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    ),
    "dora": lambda: veneer.LoraConfig(r=4, use_dora=True, target_modules=EVERY),
    "ia3": lambda: veneer.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": lambda: veneer.OFTConfig(oft_block_size=4, target_modules=EVERY),
    "vera": lambda: veneer.VeraConfig(r=8, target_modules=EVERY),
    "prefix": lambda: veneer.PrefixTuningConfig(num_virtual_tokens=4, task_type=TASK),
    "bottleneck": lambda: veneer.BottleneckConfig(kind="houlsby", width=8),
    "pissa": lambda: veneer.LoraConfig(r=4, init_lora_weights="pissa", target_modules=EVERY),
    "saved": lambda: veneer.LoraConfig(
        r=4, target_modules=[*EVERY, "embed_tokens"], modules_to_save=["lm_head"], bias="all"
    ),
    "rows": lambda: veneer.LoraConfig(r=4, target_modules=EVERY, trainable_token_indices=[1, 2]),
    "norms": lambda: veneer.LNTuningConfig(target_modules=["input_layernorm"]),
    "parameter": lambda: veneer.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
}


def base() -> nn.Module:
    """A tiny Llama, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")  # fmt: skip
    return LlamaForCausalLM(config)


def partitioned(folder: Path) -> nn.Module:
    """The same, of which each process keeps a part of each weight while it reads them (zero.Init)."""
    from transformers.integrations import HfDeepSpeedConfig

    if dist.get_rank() == 0:
        base().save_pretrained(folder)
    dist.barrier()
    settings = HfDeepSpeedConfig(zero_config(stage=3))
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    del settings
    assert all(p.numel() == 0 for p in model.parameters())
    return model


def batches() -> list[Tensor]:
    """The global batches (ROWS, LENGTH), a few that come again and again."""
    few = [torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return [few[i % 4] for i in range(STEPS)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def averaged(loss: Tensor) -> float:
    """The loss of the global batch."""
    value = loss.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def own_rows(ids: Tensor) -> Tensor:
    if not dist.is_initialized():
        return ids
    n = ROWS // dist.get_world_size()
    return ids[dist.get_rank() * n :][:n]


def plain(model: nn.Module, called: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(trained(called), lr=1e-2)
    losses = []
    for ids in batches():
        rows = own_rows(ids)
        loss = called(input_ids=rows, labels=rows).loss
        losses.append(averaged(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def ddp(model: nn.Module) -> list[float]:
    return plain(model, nn.parallel.DistributedDataParallel(model))


def fsdp(model: nn.Module, *, layers: bool = False, mixed: bool = False) -> list[float]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if mixed else {}
    base = model.get_base_model()
    for block in base.model.layers:
        if layers:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    fully_shard(module, **options)
        fully_shard(block, **options)
    fully_shard(model, **options)
    return plain(model, model)


def zero_config(stage: int, offload: bool = False) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # its default is 1
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if offload:
        config["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return config


def zero(model: nn.Module, *, stage: int, offload: bool = False) -> list[float]:
    import deepspeed

    config = zero_config(stage, offload)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for ids in batches():
        rows = own_rows(ids)
        loss = engine(input_ids=rows, labels=rows).loss
        losses.append(averaged(loss))
        engine.backward(loss)
        engine.step()
    return losses


def merges(model: nn.Module, folder: Path) -> None:
    """Merging what ZeRO-3 has put away is as merging whole weights is, and brings the exact bits back."""
    alone = veneer.PeftModel.from_pretrained(base(), folder)
    alone.merge_adapter()
    layer, one = (m.get_base_model().model.layers[0].mlp.down_proj for m in (model, alone))
    before = sharding.gathered(sharding.gathered_value(layer.weight))
    model.merge_adapter()
    merged = sharding.gathered(sharding.gathered_value(layer.weight))
    torch.testing.assert_close(merged, one.weight)
    assert not torch.equal(merged, before)
    model.unmerge_adapter()
    assert torch.equal(sharding.gathered(sharding.gathered_value(layer.weight)), before)


LAYOUTS: dict[str, Any] = {
    "single": lambda m: plain(m, m),
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp-layers": lambda m: fsdp(m, layers=True),
    "fsdp-mixed": lambda m: fsdp(m, mixed=True),
    "fsdp-mixed-layers": lambda m: fsdp(m, layers=True, mixed=True),
    "zero2": lambda m: zero(m, stage=2),
    "zero3": lambda m: zero(m, stage=3),
    "zero3-init": lambda m: zero(m, stage=3),
    "zero3-offload": lambda m: zero(m, stage=3, offload=True),
}


def main(layout: str, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    linear.SMALL = 0  # the functions that large inputs take
    if layout != "single":
        if layout.startswith("zero"):
            import deepspeed

            deepspeed.init_distributed("gloo")
        else:
            dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name in names or METHODS:
        try:
            given = partitioned(folder / "base") if layout == "zero3-init" else base()
            torch.manual_seed(1)
            model = veneer.get_peft_model(given, METHODS[name]())
            losses = LAYOUTS[layout](model)
            model.save_pretrained(folder / layout / name)
            found[name] = losses
            if layout in ("zero3-init", "fsdp") and name == "lora":
                merges(model, folder / layout / name)
        except Exception:
            found[name] = traceback.format_exc()
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / f"{layout}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        leave_process()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
