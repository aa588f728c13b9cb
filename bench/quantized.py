"""What a training step costs on a quantized base, bitsandbytes' int8 and nf4, in time and in memory."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .figures import LIBRARIES
from .harness import ROOT, Figure, interleaved
from .trio import SAID, beside, drawn, llama, same_step, step, timed

STORES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


def quantized_pair(store: str, hidden: int, layers: int, r: int) -> dict[str, Any]:
    """The same LoRA, off its start, in both libraries on bases that were quantized alike."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every int8 call that it casts
    with tempfile.TemporaryDirectory() as folder:
        llama(hidden, layers).save_pretrained(folder)
        models: dict[str, Any] = {}
        for name, library in LIBRARIES.items():
            config = BitsAndBytesConfig(**STORES[store])
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
            model = library.get_peft_model(base, library.LoraConfig(r=r, target_modules="all-linear"))
            generator = torch.Generator().manual_seed(1)
            named = {
                n.replace(":default", ".default.weight"): p for n, p in model.named_parameters() if p.requires_grad
            }
            for key in sorted(named):
                named[key].data = torch.randn(named[key].shape, generator=generator) * 0.02
            models[name] = model.train()
    return models


@timed
def quantized_steps(quick: bool) -> list[Figure]:
    """A step of all-linear LoRA on an nf4 and on an int8 base, against peft's."""
    found = []
    hidden, layers, r, rows, tokens = 512, 2, 8, 2 if quick else 4, 64 if quick else 128
    for store in STORES:
        models, ids = quantized_pair(store, hidden, layers, r), drawn(rows, tokens)
        same_step(models, ids, f"{store} step")
        taken = interleaved({n: partial(step, m, ids) for n, m in models.items()}, 3 if quick else 12, warmup=1)
        found.append(
            beside(
                f"{store} step / peft's",
                taken,
                "peft",
                bar=1.0,
                note=f"h={hidden}, {layers} layers, r={r}, {rows} x {tokens} tokens; {SAID}",
                row=f"{store} training step ÷ peft's",
            )
        )
    return found


def peak(store: str, rows: int, tokens: int, steps: int = 3) -> dict[str, Any]:
    """What `veneer train` holds: LoRA on SmolLM2 in a process of its own, where this is called."""
    import gc

    import veneer
    from veneer.recipes.malloc import release_memory
    from veneer.recipes.tasks import TASKS

    from .plan import resident

    torch.set_num_threads(1)
    quantize = None if store == "float32" else store
    if quantize is not None:
        release_memory()
    base = TASKS["causal-lm"].load_model("smollm2-135m", "float32", quantize)
    if quantize is not None:
        veneer.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    gc.collect()
    loading = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(100, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(p.numel() * p.element_size() for n, p in base.named_parameters() if ":" not in n)
    return {"loading": loading, "steps": resident("VmHWM"), "weights": weights, "loss": loss.item()}


@timed
def quantized_memory(quick: bool) -> list[Figure]:
    """The most memory of a process that trains LoRA on SmolLM2 in nf4, over that of one that does in float32."""
    rows, tokens = (2, 64) if quick else (8, 128)
    found = {}
    for store in ("nf4", "float32"):
        code = f"import json; from bench.quantized import peak; print(json.dumps(peak({store!r}, {rows}, {tokens})))"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
        )
        found[store] = json.loads(said.stdout.splitlines()[-1])
    nf4, plain = found["nf4"], found["float32"]
    ratio = nf4["steps"] / plain["steps"]
    said_of = ", ".join(
        f"{s} {m['steps'] / 1e9:.2f} GB (weights {m['weights'] / 1e6:.0f} MB)" for s, m in found.items()
    )
    note = (
        f"SmolLM2-135M, r=8 on all linears, {rows} x {tokens} tokens, 3 steps, as `veneer train` sets it up: {said_of}"
    )
    return [Figure("nf4 host peak / float32's", ratio, ratio, ratio, "ratio", 1.0, note=note)]
