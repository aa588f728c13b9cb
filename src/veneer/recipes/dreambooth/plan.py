"""What memory a DreamBooth run takes: one step on the meta device, counted as `veneer plan` does."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import torch

from ...planning import ledger
from ...planning.layout import Counted, Peak, compute_peak
from ...planning.settings import Settings, size
from ..errors import InputError, user_input
from .denoiser import Denoiser, set_attention
from .settings import DreamBooth


def list_parts(name: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """UNet, text encoder and VAE on the meta device: of a folder, a hub id, or the shapes that are shipped.

    Raises:
        InputError: no such model.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with open(Path(__file__).with_name("shapes.toml"), "rb") as file:
        shipped = tomllib.load(file)
    if name.lower() in (hub.lower() for hub in shipped["hub"]) and not Path(name).is_dir():
        unet, vae, text = shipped["unet"], shipped["vae"], CLIPTextConfig(**shipped["text_encoder"])
    else:
        try:
            unet = UNet2DConditionModel.load_config(name, subfolder="unet")
            vae = AutoencoderKL.load_config(name, subfolder="vae")
            text = CLIPTextConfig.from_pretrained(name, subfolder="text_encoder")
        except (OSError, ValueError) as error:
            raise InputError(
                f"model {name!r}: its configs cannot be read ({str(error).splitlines()[0]}); give a folder that diffusers "
                f"saved, or one of {', '.join(shipped['hub'])}"
            ) from error
    with torch.device("meta"):
        made = UNet2DConditionModel.from_config(unet), CLIPTextModel(text), AutoencoderKL.from_config(vae)
    return tuple(m.to(dtype) for m in made)


def plan_run(run: DreamBooth) -> tuple[Peak, int]:
    """The peak of a run on one device, and how many numbers it trains."""
    from diffusers import DDPMScheduler

    import veneer

    unet, text, vae = list_parts(run.model, getattr(torch, run.dtype))
    set_attention(run.attention, unet, vae)
    for module in (unet, text, vae):
        module.requires_grad_(False)
    adapted = {"unet": unet, **({"text_encoder": text} if run.train_text_encoder else {})}
    for name, module in adapted.items():
        veneer.inject_adapter_in_model(run.config(name), module, low_cpu_mem_usage=True)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if run.train_text_encoder:
            text.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prior = run.class_prompt is not None
    model = Denoiser(unet, text, vae, DDPMScheduler(), run.prior_weight, run.train_text_encoder).train()
    rows = run.batch_size * (2 if prior else 1)
    side = run.resolution
    inputs = {
        "pixels": torch.zeros(rows, 3, side, side, device="meta"),
        "input_ids": torch.zeros(rows, text.config.max_position_embeddings, dtype=torch.long, device="meta"),
    }
    step = ledger.measure_peak(
        model, lambda: model(**inputs, prior=prior)["loss"], accumulates=run.gradient_accumulation > 1, device="cuda"
    )
    weights = [(p, p.numel() * p.element_size()) for p in model.parameters()]
    counted = Counted(
        frozen=sum(n for p, n in weights if not p.requires_grad),
        trained=sum(n for p, n in weights if p.requires_grad),
        trained_numbers=sum(p.numel() for p, _ in weights if p.requires_grad),
        all_numbers=sum(p.numel() for p, _ in weights),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        step=step,
    )
    settings = Settings(
        batch_size=rows, length=(side // 8) ** 2, dtype=run.dtype, gradient_checkpointing=run.gradient_checkpointing,
        optimizer="adamw" if run.optimizer == "adamw" else "adamw-8bit",
    )  # fmt: skip
    return compute_peak(counted, settings), counted.trained_numbers


def show_plan(run: DreamBooth, gpu: str | None) -> None:
    """Print the plan."""
    from rich.console import Console
    from rich.table import Table

    with user_input():
        room = None if gpu is None else size(gpu)
        found, trained = plan_run(run)
    console = Console()
    table = Table("on the device", "GB", "")
    for part in (*found.parts, *found.outside):
        table.add_row(part.name, f"{part.bytes / 1e9:.2f}", part.note)
    console.print(table)
    console.print(
        f"trains {trained:,} numbers; {found.device / 1e9:.2f} GB in PyTorch's allocator, {found.card / 1e9:.2f} GB with the rest"
    )
    if room is not None:
        fits = found.card <= room
        remedy = "" if fits or run.gradient_checkpointing else "; try --gradient-checkpointing"
        console.print(f"{'fits' if fits else 'does not fit'} in {room / 1e9:.1f} GB{remedy}")
