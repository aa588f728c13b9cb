"""Memory of quantized bases on a host: the file that stays mapped, and what the allocator keeps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import veneer

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

# Blocks between others that stay: holes of 80 MB, above glibc's first limit and below what it raises that to.
HOLES = """
import sys, torch
from veneer.recipes.malloc import release_memory
done = release_memory() if sys.argv[1] == "give" else None
torch.empty(8 << 20, dtype=torch.uint8).fill_(1)
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) >> 10
start = resident()
blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(40)]
del blocks[::2]
print(done, resident() - start)
"""


def holes(how: str, **environment: str) -> tuple[str, int]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_"))} | environment
    command = [sys.executable, "-c", HOLES, how]
    said = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120, check=True)
    done, grown = said.stdout.split()
    return done, int(grown)


def test_freed_blocks_go_back_to_the_system() -> None:
    if not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        pytest.skip("another C library")
    done, grown = holes("give")
    assert done == "True" and grown < 100  # 80 MB are in use
    assert holes("keep")[1] > 140
    assert holes("give", MALLOC_MMAP_THRESHOLD_="8388608") == ("False", pytest.approx(160, abs=20)), "the user's word"


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("attached", [False, True], ids=["base", "adapted"])
def test_the_file_of_a_quantized_base_is_let_go(attached: bool, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True))
    made.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    base.train()  # evaluated, bitsandbytes may pack the weights anew
    ids = torch.arange(6)[None]
    with torch.no_grad():  # else the graph holds what it saved
        before = base(ids).logits
    if not mapped(tmp_path):
        pytest.skip("this version of safetensors reads the file")
    if attached:
        veneer.get_peft_model(base, veneer.LoraConfig(r=2, target_modules="all-linear"))
    veneer.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    gc.collect()
    assert not mapped(tmp_path)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base(ids).logits, before)
