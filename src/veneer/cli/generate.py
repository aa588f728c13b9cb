"""Continuing prompts."""

from __future__ import annotations

from ..recipes.errors import InputError, user_input
from ..recipes.tasks import TASKS
from ..recipes.tasks.base import complete_prompts
from ..recipes.trained import Trained, read_task


def answer_prompts(
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

    from ..files import adapter_files
    from ..methods.base import PeftConfig

    console = Console()
    torch.manual_seed(seed)
    with user_input():
        purpose = (
            read_task(adapter, PeftConfig.from_pretrained(adapter), task) if adapter else Trained(task or "causal-lm")
        )
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
                adapter_files.check_tokenizer(adapter, getattr(processor, "tokenizer", processor))
        names = [str(n) for n in getattr(base.config, "id2label", {}).values()] if of.classes else []
        rows = [of.row(run, p, context, names) for p in prompts]
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    for prompt, row in zip(prompts, rows, strict=True):
        with console.status("generating"), user_input():
            if of.by_token:
                asked = of.asked(run, [row], processor)
                text = complete_prompts(adapted, processor, asked, max_new_tokens, **options)[0]
            else:
                text = of.answers(run, base, processor, [row])[0]
        console.print(prompt, style="dim", markup=False, highlight=False, end="\n" if prompt.endswith("\n") else " ")
        console.print(text, style="bold", markup=False, highlight=False)
