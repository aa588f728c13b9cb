"""Continuing prompts."""

from __future__ import annotations

from typing import Any

from .errors import InputError, user_input
from .tasks import TASKS
from .tasks.base import evaluating
from .trained import Trained, trained


def complete(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, **options: Any) -> list[str]:
    """What a model says after each prompt, greedily unless `options` say otherwise."""
    answers = []
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        length = ids["input_ids"].shape[1]
        if not encoder_decoder and length > 1 and int(ids["input_ids"][0, -1]) == tokenizer.eos_token_id:
            ids = {k: v[:, :-1] for k, v in ids.items()}
            length -= 1
        with evaluating(model):
            settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            out = model.generate(**ids, **{**settings, **options})[0]
        answers.append(tokenizer.decode(out if encoder_decoder else out[length:], skip_special_tokens=True).strip())
    return answers


def generate(
    model: str,
    adapter: str | None,
    prompts: list[str],
    task: str | None,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    quantize: str | None,
    seed: int,
    context: str | None = None,
    force: bool = False,
) -> None:
    """Print what the model says after each prompt, or of each text, image or sound file.

    Raises:
        InputError: no such model or adapter, they do not go together, or a prompt that the task cannot use.
    """
    import torch
    from rich.console import Console

    import veneer

    from .. import codec

    console = Console()
    torch.manual_seed(seed)
    with user_input():
        purpose = trained(adapter, codec.load_config(adapter), task) if adapter else Trained(task or "causal-lm")
        of = TASKS[purpose.task]
        if temperature and not of.by_token:
            raise InputError(f"--temperature {temperature}: {purpose.task} draws nothing; leave it out")
        if context is not None and purpose.task != "question-answering":
            raise InputError(f"--context is the text of a question, and {purpose.task} asks none; leave it out")
        run = purpose.run(model, chat=chat, max_new_tokens=max_new_tokens, max_length=512)
        with console.status("loading the model"):
            base, processor = purpose.load(model, quantize=quantize), of.processor(run)
            adapted = base
            if adapter:
                adapted = veneer.PeftModel.from_pretrained(base, adapter, strict=not force)
                codec.check_tokenizer(adapter, getattr(processor, "tokenizer", processor))
        names = [str(n) for n in getattr(base.config, "id2label", {}).values()] if of.classes else []
        rows = [of.row(run, p, context, names) for p in prompts]
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    for prompt, row in zip(prompts, rows, strict=True):
        with console.status("generating"), user_input():
            if of.by_token:
                asked = of.asked(run, [row], processor)
                text = complete(adapted, processor, asked, max_new_tokens, **options)[0]
            else:
                text = of.answers(run, base, processor, [row])[0]
        console.print(prompt, style="dim", markup=False, highlight=False, end="\n" if prompt.endswith("\n") else " ")
        console.print(text, style="bold", markup=False, highlight=False)
