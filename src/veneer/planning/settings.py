"""What a plan is made for, and which values are allowed."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ..targets.suggest import suggest
from .skeleton import AUTO

DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = {"adamw": 8.0, "adamw-8bit": 2.03, "sgd": 0.0}  # bytes of state for a trained number
QUANTIZED = {"int8": 1.0, "nf4": 0.5625}  # bytes of a weight; nf4 with a float32 for each block of 64
CHOICES: dict[str, tuple[Any, ...]] = {
    "task": (None, *AUTO),
    "dtype": DTYPES,
    "optimizer": tuple(OPTIMIZERS),
    "quantize": (None, *QUANTIZED),
    "zero": (None, 2, 3),
    "offload": (None, "cpu"),
    "device": ("cuda", "cpu"),
    "attention": (None, "sdpa", "eager"),
}
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Settings:
    """A step and the processes that run it.

    Attributes:
        task: causal-lm, seq2seq-lm or classification; None for what the model's config says.
        batch_size: rows of a micro-batch, of one process.
        length: tokens of a row, padding included.
        target_length: tokens of a row's labels, for a model with a decoder.
        dtype: of the frozen model, and of the computation.
        optimizer: adamw (two float32 a trained number), adamw-8bit, sgd.
        gradient_checkpointing: compute blocks again in the backward.
        gradient_accumulation: micro-batches of an optimizer step.
        quantize: int8 or nf4, as bitsandbytes stores linear layers; the output head stays as it is.
        zero: DeepSpeed's stage 2 or 3.
        fsdp: PyTorch's fully_shard, a group a block.
        offload: "cpu": what is sharded lives in host memory. Needs zero or fsdp.
        processes: processes of the run, one a device.
        device: "cuda", or "cpu" where model and step are in host memory.
        attention: transformers' implementation; None for its default.

    Raises:
        ValueError: a value that is not allowed, or does not go with another.
    """

    task: str | None = None
    batch_size: int = 8
    length: int = 128
    target_length: int = 32
    dtype: str = "float32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    gradient_accumulation: int = 1
    quantize: str | None = None
    zero: int | None = None
    fsdp: bool = False
    offload: str | None = None
    processes: int = 1
    device: str = "cuda"
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                named = [str(a) for a in allowed if a is not None]
                hint = suggest(str(value), named)
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(named)}{hint}")
        for name in ("batch_size", "length", "target_length", "gradient_accumulation", "processes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
        if self.zero is not None and self.fsdp:
            raise ValueError(f"zero={self.zero} and fsdp shard the same tensors; give one of them")
        if self.offload is not None and self.zero is None and not self.fsdp:
            raise ValueError(f"offload={self.offload!r} needs what shards the model: zero=3 (or 2), or fsdp")
        if self.device == "cpu" and self.offload is not None:
            raise ValueError("offload='cpu': with device='cpu' everything is in host memory already; leave one out")

    def replace(self, **changes: Any) -> Settings:
        return dataclasses.replace(self, **changes)

    @property
    def layout(self) -> str:
        """How processes share the work, in words."""
        if self.zero is not None:
            shown = f"ZeRO-{self.zero}"
        elif self.fsdp:
            shown = "FSDP2"
        else:
            shown = "DDP" if self.processes > 1 else "one process"
        if self.offload is not None:
            shown += " with CPU offload"
        return shown if shown == "one process" else f"{shown}, {self.processes} process{'es' * (self.processes > 1)}"


def size(text: str | int) -> int:
    """Bytes of "11GB" (11 * 10^9) or "11GiB"; a number is bytes already.

    Raises:
        ValueError: no number, no unit, or nothing that a device could have.
    """
    if isinstance(text, int):
        text = f"{text / 10**6:f}MB"
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None:
        raise ValueError(f"gpu={text!r} is no size; write it as 11GB or 24GiB")
    number, unit = found.groups()
    if unit.upper() not in UNITS:
        said = f"has the unit {unit!r}" if unit else "has no unit"
        raise ValueError(f"gpu={text!r} {said}; write it as {number}GB (10^9 bytes) or {number}GiB (2^30)")
    value = float(number) * UNITS[unit.upper()]
    if not 10**8 <= value <= 10**13:
        raise ValueError(f"gpu={text!r}: no device has that much or that little memory; write it as 11GB or 24GiB")
    return int(value)
