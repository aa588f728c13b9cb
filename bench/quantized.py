"""What a training step costs on a quantized base, bitsandbytes' int8 and nf4."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .figures import LIBRARIES
from .harness import Figure, interleaved
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
