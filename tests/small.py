"""Small models that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer

IDS = torch.arange(10)[None]  # (1, 10)


def llama(layers: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random Llama with 32 channels, always the same weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=2, **options)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def lora(model: nn.Module | None = None, name: str = "default", seed: int = 1, **options: Any) -> Any:
    """A PeftModel whose LoRA is no longer at its start."""
    options = {"r": 4, "target_modules": "all-linear", **options}
    adapted = veneer.get_peft_model(llama() if model is None else model, veneer.LoraConfig(**options), name)
    scramble(adapted, seed)
    return adapted.eval()


def scramble(model: nn.Module, seed: int = 1) -> None:
    """Move every trained parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype))


def bits(model: nn.Module) -> dict[str, bytes]:
    """The exact bits of every base tensor."""
    tensors = {k: v for k, v in model.state_dict().items() if ":" not in k}
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in tensors.items()}


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry of the two, so that a bound holds on any processor.

    A float32 sum of k terms in another order differs by up to k roundings of 6e-8: models here add up some tens of terms a layer
    and few layers, so 1e-5 is a different order of operations and 1e-3 an error.
    """
    size = torch.stack([t.detach().abs().max().double().cpu() for t in (actual, expected)]).max()
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max()
    return float(difference / size.clamp_min(torch.finfo(torch.float32).tiny))
