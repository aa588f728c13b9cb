"""What a DreamBooth run does, and what is allowed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import convert_value
from ..run import check_fields, make_field

UNET = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass
class DreamBooth:
    """One run. Every field is a flag.

    Raises:
        ValueError: a value out of range, or one that needs another which is missing.
    """

    model: str = make_field("", "Stable Diffusion model: hub id, or a folder that diffusers saved")
    instance_data: str = make_field("", "folder with images of the subject")
    instance_prompt: str = make_field("", "their prompt, with a rare word for the subject: 'a photo of sks dog'")
    class_data: str | None = make_field(
        None, "folder with images of the subject's class, for prior preservation; it is filled up to --class-images"
    )
    class_prompt: str | None = make_field(
        None, "the class's prompt, which turns prior preservation on: 'a photo of a dog'"
    )
    class_images: int = make_field(200, "images of the class", low=1)
    prior_weight: float = make_field(1.0, "weight of the class's loss", low=0)
    out: str = make_field("", "folder for the adapter, samples and report [default: runs/dreambooth-NAME]")
    rank: int = make_field(16, "rank of the UNet's LoRA", low=1)
    alpha: float | None = make_field(None, "its alpha [default: the rank]", low=0)
    dropout: float = make_field(0.0, "its dropout", low=0)
    train_text_encoder: bool = make_field(False, "LoRA on the text encoder too")
    steps: int = make_field(800, "optimizer steps", low=1)
    learning_rate: float = make_field(1e-4, "peak learning rate", low=0)
    scheduler: str = make_field("constant", "how the rate falls", allowed=("constant", "linear", "cosine"))
    warmup: int = make_field(0, "steps of linear warm-up", low=0)
    batch_size: int = make_field(1, "images of the subject a step; as many of the class come with them", low=1)
    gradient_accumulation: int = make_field(1, "batches an optimizer step", low=1)
    gradient_checkpointing: bool = make_field(False, "compute activations again in backward, to save memory")
    optimizer: str = make_field(
        "adamw", "adamw8bit keeps its state in 8 bits (bitsandbytes)", allowed=("adamw", "adamw8bit")
    )
    attention: str = make_field(
        "sdpa", "sdpa, or eager, which forms all scores (diffusers before 2.0 of PyTorch)", allowed=("sdpa", "eager")
    )
    dtype: str = make_field("float32", "dtype of the frozen model", allowed=("float32", "bfloat16", "float16"))
    resolution: int = make_field(512, "side of the images, in pixels; a multiple of 8", low=8)
    center_crop: bool = make_field(False, "cut images in the middle, not at a random place")
    validation_prompt: str | None = make_field(None, "prompt of the sample images [default: the instance prompt]")
    samples: int = make_field(4, "sample images each time; 0 for none", low=0)
    sample_every: int = make_field(100, "steps between sample images; 0 only at the ends", low=0)
    sample_steps: int = make_field(25, "denoising steps of a sample image", low=1)
    guidance: float = make_field(7.5, "classifier-free guidance of a sample image", low=0)
    save_every: int = make_field(200, "steps between checkpoints; 0 for none", low=0)
    log_every: int = make_field(5, "steps between lines of metrics.jsonl", low=1)
    seed: int = make_field(0, "seed of everything random", low=0)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "instance_data", "instance_prompt"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name.replace('_', '-')} ({HELP[name]})")
        if self.class_data is not None and self.class_prompt is None:
            raise ValueError("class_data needs --class-prompt, which says what those images show")
        if self.resolution % 8:
            raise ValueError(f"resolution={self.resolution}: must be a multiple of 8, by which the latents are smaller")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: must be below 1")

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / f"dreambooth-{Path(self.instance_data).name}"

    @property
    def class_folder(self) -> Path:
        """Where the images of the class are, or go."""
        return Path(self.class_data) if self.class_data else self.folder / "class"

    def config(self, part: str) -> Any:
        """The LoRA of "unet" or "text_encoder"."""
        from ...methods.lora import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            init_lora_weights="gaussian",
            target_modules=UNET if part == "unet" else TEXT,
        )


FIELDS = dataclasses.fields(DreamBooth)
HELP: dict[str, str] = {}
for _f in FIELDS:
    _default = "" if _f.default in (None, "") else f" [default: {_f.default}]"
    HELP[_f.name] = _f.metadata["help"] + _default


def build_run(flags: dict[str, Any]) -> DreamBooth:
    """A run from the command's flags.

    Raises:
        ValueError: a value of the wrong type, or one that is not allowed.
    """
    return DreamBooth(**{f.name: convert_value(f, flags[f.name]) for f in FIELDS if flags.get(f.name) is not None})
