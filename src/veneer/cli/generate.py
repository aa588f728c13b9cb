"""Continuing prompts."""

from __future__ import annotations

from typing import Any

from .errors import user_input
from .models import load_model, load_tokenizer
from .tasks.text import prompt_text


def complete(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, **options: Any) -> list[str]:
    """What a model says after each prompt, greedily unless `options` say otherwise."""
    import torch

    was_training = model.training
    model.eval()
    answers = []
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        length = ids["input_ids"].shape[1]
        if not encoder_decoder and length > 1 and int(ids["input_ids"][0, -1]) == tokenizer.eos_token_id:
            ids = {k: v[:, :-1] for k, v in ids.items()}
            length -= 1
        with torch.no_grad():
            settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            out = model.generate(**ids, **{**settings, **options})[0]
        answers.append(tokenizer.decode(out if encoder_decoder else out[length:], skip_special_tokens=True).strip())
    model.train(was_training)
    return answers


def generate(
    model: str,
    adapter: str | None,
    prompts: list[str],
    task: str,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    quantize: str | None,
    seed: int,
) -> None:
    """Print what the model says after each prompt."""
    import torch
    from rich.console import Console

    import veneer

    from .. import codec

    console = Console()
    torch.manual_seed(seed)
    with console.status("loading the model"):
        base, tokenizer = load_model(model, task, quantize=quantize), load_tokenizer(model)
        if adapter:
            with user_input():
                base = veneer.PeftModel.from_pretrained(base, adapter)
                codec.check_tokenizer(adapter, tokenizer)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    for prompt in prompts:
        with console.status("generating"):
            text = complete(base, tokenizer, [prompt_text(chat, prompt, tokenizer)], max_new_tokens, **options)[0]
        console.print(prompt, style="dim", markup=False, highlight=False, end="\n" if prompt.endswith("\n") else " ")
        console.print(text, style="bold", markup=False, highlight=False)
