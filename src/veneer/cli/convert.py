"""Writing an adapter of any method that changes weights as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipes.errors import InputError, user_input
from ..recipes.trained import read_task


def convert_adapter(adapter: str, out: Path, rank: str, model: str | None, task: str | None, force: bool) -> None:
    """Convert an adapter and print how near each layer comes."""
    from rich.console import Console
    from rich.table import Table

    import veneer

    console = Console()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"{out} exists and is not empty; give a new folder")
    with user_input():
        wanted = parse_rank(rank)
        config = veneer.PeftConfig.from_pretrained(adapter)
        base = model or config.base_model_name_or_path
        if not base:
            raise InputError(f"{adapter} names no base model, whose weights the conversion needs; give it with --model")
        with console.status("loading the model"):
            loaded: Any = read_task(adapter, config, task).load(base)
            adapted = veneer.PeftModel.from_pretrained(loaded, adapter, strict=not force)
        with console.status("converting"):
            made = veneer.save_as_lora(out, adapted, wanted)
    table = Table("layer", "rank", "relative error")
    worst = sorted(made.quality.items(), key=lambda item: -item[1].error)
    for name, quality in worst[:12]:
        table.add_row(name, str(quality.rank), f"{quality.error:.2e}")
    if len(worst) > 12:
        table.add_row(f"and {len(worst) - 12} more, all below", "", f"{worst[12][1].error:.2e}")
    console.print(table)
    console.print(f"wrote {config.peft_type} adapter [bold]{adapter}[/] as LoRA: {out}")


def parse_rank(rank: str) -> float:
    """A rank as it is typed: a whole number, or a fraction.

    Raises:
        InputError: it is neither.
    """
    try:
        return int(rank)
    except ValueError:
        pass
    try:
        return float(rank)
    except ValueError:
        raise InputError(
            f"--rank {rank}: must be a whole number, or a fraction in (0, 1] of the energy to keep"
        ) from None
