"""transformers' own 8-bit floats: FP8Linear, an nn.Linear with weight (out, in) in float8_e4m3fn and `weight_scale_inv`,
one factor a block of the weight (DeepSeek-V3, arxiv.org/abs/2412.19437, section 3.3.2), or one for all of it.

Its forward is a GPU kernel that transformers fetches from the hub; on a CPU the layer raises that it is missing. Its
backward, on a GPU, multiplies by the dequantized weight.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backend

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class FP8(Backend):
    name = "fp8"
    holds = "FP8Linear's weights with their factors"

    def matches(self, owner: nn.Module, param: str) -> bool:
        library = sys.modules.get("transformers.integrations.finegrained_fp8")
        if library is None or param != "weight" or not isinstance(owner, library.FP8Linear):
            return False
        return self.storage(owner, param).dtype == torch.float8_e4m3fn

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        bias = owner._parameters.get("bias")
        return torch.bfloat16 if bias is None else bias.dtype  # the layer takes inputs of any; bfloat16 is meant

    def can_write(self, owner: nn.Module, param: str) -> bool:
        scale: Any = owner.weight_scale_inv
        return bool(scale.dtype == torch.float32)  # the powers of two of ue8m0 are chosen by who made the file

    def read(self, owner: nn.Module, param: str) -> Tensor:
        layer: Any = owner
        return self.before(owner, param, (layer.weight.data, layer.weight_scale_inv.data))

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        layer: Any = owner
        old: Any = token
        weight, scale = old
        value: Tensor = weight.float() * spread_scales(scale.float(), layer.block_size, weight.shape)  # (out, in)
        return value

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        layer: Any = owner
        old = (layer.weight.data, layer.weight_scale_inv.data)
        value = value.to(device=old[0].device, dtype=torch.float32)
        scale = largest_finite(value, layer.block_size).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        scaled = value / spread_scales(scale, layer.block_size, value.shape)
        layer.weight.data = scaled.clamp(-LARGEST, LARGEST).to(old[0].dtype)
        layer.weight_scale_inv.data = scale
        return old

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        layer: Any = owner
        layer.weight.data, layer.weight_scale_inv.data = token  # type: ignore[misc]


def spread_scales(scale: Tensor, block: tuple[int, int] | None, shape: torch.Size) -> Tensor:
    """Factors of blocks (out / b, in / c) -> of entries, (out, in); one factor () stays as it is."""
    if block is None:
        return scale
    tall = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return tall.repeat_interleave(block[1], 1)[:, : shape[1]]


def largest_finite(weight: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The largest magnitude in each block of a weight (out, in), (out / b, in / c); () without blocks."""
    magnitude = weight.abs()
    if block is None:
        return magnitude.max()
    # Blocks at the edges are cut short; their padding is 0, below any magnitude.
    return nn.functional.max_pool2d(magnitude[None, None], tuple(block), ceil_mode=True)[0, 0]
