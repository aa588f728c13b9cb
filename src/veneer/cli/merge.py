"""Baking an adapter into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError, user_input
from .models import load_model, load_tokenizer
from .recipe import TASKS


def merge(model: str, adapter: str, out: Path, task: str | None, dtype: str) -> None:
    """Write base and adapter as one plain model that transformers loads by itself."""
    from rich.console import Console

    import veneer

    console = Console()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"{out} exists and is not empty; give a new folder")
    with user_input():
        config = veneer.PeftConfig.from_pretrained(adapter)
        names = {v: k for k, v in TASKS.items()}
        chosen = task or names.get(config.task_type or "", "causal-lm")
        with console.status("loading the model"):
            base = load_model(model, chosen, dtype)
            adapted = veneer.PeftModel.from_pretrained(base, adapter)
        with console.status("merging"):
            plain: Any = adapted.merge_and_unload(safe_merge=True)
        with console.status(f"writing {out}"):
            plain.save_pretrained(out)
            load_tokenizer(model).save_pretrained(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    console.print(f"merged {config.peft_type} adapter [bold]{adapter}[/] into {model}: {out} ({size / 1e6:.1f} MB)")
