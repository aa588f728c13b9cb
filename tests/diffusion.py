"""A tiny Stable Diffusion pipeline, built from configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def pipeline(folder: Path) -> Any:
    """All parts of Stable Diffusion 1, small, with random weights; images of 32 x 32."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = ["a", "photo", "of", "sks", "dog", "cat"]
    letters = sorted({c for w in words for c in w})
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), *(f"{w}</w>" for w in words if len(w) > 1)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def images(folder: Path, count: int = 3) -> Path:
    """Files of several modes: colour, grey, transparent, 16 bits."""
    folder.mkdir()
    for i, mode in zip(range(count), ("RGB", "L", "RGBA", "I;16", "P"), strict=False):
        image = Image.linear_gradient("L").rotate(90 * i).resize((40, 36))
        (image if mode == "L" else image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(
            folder / f"{i}.png"
        )
    return folder
