"""A tiny Stable Diffusion pipeline, built from configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def clip(folder: Path, **options: Any) -> tuple[Any, Any]:
    """A CLIP tokenizer of six words, and the config of a text model for it."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    words = ["a", "photo", "of", "sks", "dog", "cat"]
    letters = sorted({c for w in words for c in w})
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), *(f"{w}</w>" for w in words if len(w) > 1)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    return tokenizer, config


def autoencoder(latents: int = 4, **options: Any) -> Any:
    """Images of 32 x 32 to latents of 4 x 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=latents, norm_num_groups=4, sample_size=32, **options,
    )  # fmt: skip


def steps() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


UNET = {"sample_size": 4, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
UNET |= {"attention_head_dim": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def pipeline(folder: Path) -> Any:
    """All parts of Stable Diffusion 1, small, with random weights; images of 32 x 32."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokenizer, config = clip(folder)
    text = CLIPTextModel(config)
    unet = UNet2DConditionModel(**UNET, cross_attention_dim=32)
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=steps(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def xl(folder: Path) -> Any:
    """Stable Diffusion XL: two text encoders, and a UNet that is told the image's size."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer, config = clip(folder)
    unet = UNet2DConditionModel(
        **UNET, cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=False), text_encoder=CLIPTextModel(config), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer, unet=unet, scheduler=steps(),
        add_watermarker=False,
    )  # fmt: skip


def flux(folder: Path) -> Any:
    """Flux: a transformer over packed latents. Its text encoders are left out: prompts come as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return FluxPipeline(
        vae=autoencoder(1, scaling_factor=0.5, shift_factor=0.1), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
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
