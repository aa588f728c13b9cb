"""The same thing done very often: memory stays flat, and merging leaves no trace."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import veneer
from small import scramble

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
IDS = torch.arange(1, 9)[None]  # (1, 8)
MERGED = (["lora"], ["dora"], ["oft", "lora"], ["ia3"])  # what is merged, in turn
STORES = ("bf16", "fp16", "nf4", "int8")


def base(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


def configs() -> dict[str, Any]:
    linear = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "lora": veneer.LoraConfig(r=4, target_modules="all-linear"),
        "dora": veneer.LoraConfig(r=4, target_modules=linear, use_dora=True),
        "oft": veneer.OFTConfig(oft_block_size=8, target_modules=linear),
        "ia3": veneer.IA3Config(task_type="CAUSAL_LM"),
    }


def resident() -> int:
    """Bytes of this process in memory, after everything free went back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def counted() -> Counter[str]:
    """How many objects of each of our types there are, tensors and modules among them."""
    gc.collect()
    kinds: Counter[str] = Counter()
    for thing in gc.get_objects():
        cls = type(thing)
        if issubclass(cls, torch.Tensor):
            kinds["tensors"] += 1
        elif issubclass(cls, nn.Module) or str(cls.__module__).startswith("veneer"):
            kinds[cls.__qualname__] += 1
    return kinds


def saved(folder: Path) -> list[Path]:
    """Adapters of several methods, as files."""
    soft = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    more = {
        "copy": veneer.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "tokens": veneer.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        "prefix": veneer.PrefixTuningConfig(**soft),
        "bottleneck": veneer.BottleneckConfig(reduction_factor=4),
    }
    made = []
    for name, config in {**configs(), **more}.items():
        model = veneer.get_peft_model(base(), config)
        scramble(model)
        model.save_pretrained(folder / name)
        made.append(folder / name)
    return made


def loads(size: int) -> dict[str, Any]:
    """Load an adapter under a new name, switch to it, run, generate, delete it; `size` times after a warm-up."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as where, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = saved(Path(where))
        model: Any = veneer.get_peft_model(base(), veneer.LoraConfig(r=4, target_modules="all-linear"))
        scramble(model)
        model.eval()

        def cycle(i: int) -> None:
            name = f"cycle{i}"
            model.load_adapter(folders[i % len(folders)], name)
            model.set_adapter(name)
            with torch.no_grad():
                model(input_ids=IDS)
                with model.use_adapter("default"):
                    model.generate(
                        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False
                    )
                if not folders[i % len(folders)].name.startswith("prefix"):
                    model(input_ids=IDS.repeat(2, 1), adapter_names=[name, "__base__"])
            model.set_adapter("default")
            model.delete_adapter(name)

        with torch.no_grad():
            model.set_adapter("default")
            before = model(input_ids=IDS).logits
        warm = max(2 * len(folders), size // 5)
        for i in range(warm):
            cycle(i)
        objects, start = counted(), resident()
        peak = start
        for i in range(warm, warm + size):
            cycle(i)
            if size >= 10 and not i % (size // 10):
                peak = max(peak, resident())
        end = resident()
        left = {k: n - objects[k] for k, n in counted().items() if n > objects[k]}
        with torch.no_grad():
            same = torch.equal(model(input_ids=IDS).logits, before)
    growth = end / start - 1
    return {
        "cycles": size,
        "warm-up": warm,
        "MB before": round(start / 1e6, 1),
        "MB after": round(end / 1e6, 1),
        "MB at most": round(peak / 1e6, 1),
        "growth": f"{growth:+.3%}",
        "objects left": left,
        "outputs as before": same,
        "ok": growth < 0.01 and not left and same,
    }


def digest(model: nn.Module) -> str:
    """Of the exact bits of all that the base stores."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if ":" not in name and isinstance(value, torch.Tensor):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def merges(size: int) -> dict[str, Any]:
    """Merge and unmerge `size` times on each storage; adapters, and stacks of them, in turn."""
    figures: dict[str, Any] = {"cycles on each storage": size}
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory() as where, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base().save_pretrained(where)
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        load: dict[str, Any] = {
            "bf16": {"dtype": torch.bfloat16},
            "fp16": {"dtype": torch.float16},
            "nf4": {"quantization_config": four},
            "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        }
        for store in STORES:
            model: Any = AutoModelForCausalLM.from_pretrained(where, **load[store]).eval()
            before = digest(model)
            model = veneer.get_peft_model(model, configs()["lora"], "lora")
            for name, config in configs().items():
                if name != "lora":
                    model.add_adapter(name, config)
            scramble(model)
            model.eval()
            with torch.no_grad():
                logits = model(input_ids=IDS).logits
            changed, wrote = 0, 0
            for i in range(size):
                names = MERGED[i % len(MERGED)]
                model.set_adapter(names)
                model.merge_adapter(names)
                wrote += i < len(MERGED) and digest(model.get_base_model()) != before
                model.unmerge_adapter()
                if i < len(MERGED) or i % 25 == 0 or i == size - 1:
                    changed += digest(model.get_base_model()) != before
            model.set_adapter("lora")
            with torch.no_grad():
                same = torch.equal(model(input_ids=IDS).logits, logits)
            figures[store] = (
                f"{changed} changed, {wrote} of {min(size, len(MERGED))} merges wrote, outputs equal: {same}"
            )
            good = good and not changed and wrote == min(size, len(MERGED)) and same
    return {**figures, "ok": good}


SCENARIOS = [
    ("load, switch, delete", loads, 1000, 8, "resident memory grows by less than 1% after warm-up"),
    ("merge and unmerge", merges, 1000, 4, "0 bits changed in bf16, fp16, nf4"),
]
