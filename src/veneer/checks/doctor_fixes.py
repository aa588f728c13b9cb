"""The fixes of `veneer doctor --fix`. They change how an adapter is written, never the change of weights it makes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .doctor_files import FACTORS, MAGNITUDE, AdapterFiles, format_key, parse_key


def rename_keys(files: AdapterFiles) -> None:
    """Name the tensors as peft does; drop copies of base tensors."""
    made: dict[str, Tensor] = {}
    for key, tensor in files.tensors.items():
        wanted = format_key(key)
        if wanted is None:
            continue
        if wanted in made:
            raise ValueError(
                f"{files.where}: two keys of the file would be {wanted!r} once renamed; save the adapter again"
            )
        made[wanted] = tensor
    files.tensors = made


def rename_magnitudes(files: AdapterFiles) -> None:
    files.tensors = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: t for k, t in files.tensors.items()}


def drop_factor_biases(files: AdapterFiles) -> None:
    dropped = files.factor_bias_keys()
    files.tensors = {k: t for k, t in files.tensors.items() if k not in dropped}
    files.config["lora_bias"] = False


def name_targets(files: AdapterFiles) -> None:
    files.config["target_modules"] = sorted({m.rpartition(".")[2] for m in files.factors()})


def fold_scales(files: AdapterFiles, rank: int) -> None:
    """Use one rank and one scale for all layers: B is multiplied by the ratio of the scales, A and B are padded with zeros."""
    scale = files.scale()
    made = {}
    for key, tensor in files.tensors.items():
        name = parse_key(key)
        if name is not None and name.part in FACTORS:
            if name.part.endswith("B"):
                tensor = _multiply(tensor, files.scale(name.module) / scale)
            if name.leaf != "bias":
                axis = 0 if name.part.endswith("A") else 1
                # F.pad counts axes from the last one, with two numbers for each.
                tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 1 - axis) + [0, rank - tensor.shape[axis]])
        made[key] = tensor
    files.tensors = made
    files.config |= {
        "r": rank,
        "lora_alpha": _round_whole(scale * rank),
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def fold_rslora(files: AdapterFiles) -> None:
    """Write the same scale as alpha / r."""
    alpha = _round_whole(files.scale() * files.config.get("r", 8))
    files.config |= {"lora_alpha": alpha, "use_rslora": False}


def convert_for_pipeline(files: AdapterFiles, component: str) -> dict[str, Tensor]:
    """The tensors as diffusers reads them: keys begin with the pipeline's component, and the scale is 1."""
    made = {}
    for key, tensor in files.tensors.items():
        name = parse_key(key)
        if name is None:
            continue
        value = _multiply(tensor, files.scale(name.module)) if name.part == "lora_B" else tensor
        ending = f".{name.leaf}" if name.leaf and name.part != MAGNITUDE else ""
        made[f"{component}.{name.module}.{name.part}{ending}"] = value
    return made


def cast_tensors(files: AdapterFiles, dtype: torch.dtype) -> None:
    """Cast the floating tensors.

    Raises:
        ValueError: a value is beyond the dtype's range.
    """
    limit = torch.finfo(dtype).max
    for key, tensor in files.tensors.items():
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > limit:
            raise ValueError(
                f"{files.where}: {key} holds {float(tensor.abs().max()):.3g}, beyond {name_dtype(dtype)}'s largest, "
                f"{limit:.3g}; choose bfloat16 or float32"
            )
    files.tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in files.tensors.items()}


def name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _round_whole(value: float) -> float:
    """A whole number as an int, as configs have it."""
    return int(value) if value == int(value) else value


def _multiply(tensor: Tensor, factor: float) -> Tensor:
    # In float32, so that half precision is rounded once; a factor of 1 keeps the tensor bit by bit.
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
