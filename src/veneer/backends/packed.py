"""GPTQ's and AWQ's layers: integers of a few bits, packed into words of 32 (Frantar et al. 2022,
arxiv.org/abs/2210.17323; Lin et al. 2023, arxiv.org/abs/2306.00978).

Both hold `qweight`, `qzeros` and `scales` as buffers and no weight: W[o, i] = (q[i, o] - z[g, o]) scale[g, o], with the
group g of input i. A word holds 32 / bits integers, the first in its lowest bits; three bits fill three words with 32.
They were rounded with data that a merge does not have, so they are read and not written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Backend

# gptqmodel's kernels that keep a file's layout in memory; the others shuffle it for their GPU code when they are made.
LAYOUT_KEPT = ("base", "torch", "tritonv2", "triton", "cuda", "cuda-old", "awq_torch", "awq_gemm", "awq_triton")


class Packed(Backend):
    """What the two formats share."""

    def matches(self, owner: nn.Module, param: str) -> bool:
        held = owner._buffers.keys() | owner._parameters.keys()
        return param == "qweight" and {"qweight", "qzeros", "scales"} <= held and self.is_mine(owner)

    def linear(self, module: nn.Module) -> tuple[str, int, int] | None:
        if not self.matches(module, "qweight"):
            return None
        layer: Any = module
        return "qweight", layer.in_features, layer.out_features

    def is_mine(self, owner: nn.Module) -> bool:
        raise NotImplementedError

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        layer: Any = owner
        dtype: torch.dtype = layer.scales.dtype
        return dtype

    def can_write(self, owner: nn.Module, param: str) -> bool:
        return False

    def read(self, owner: nn.Module, param: str) -> Tensor:
        kernel = getattr(owner, "QUANT_TYPE", "base")
        if kernel not in LAYOUT_KEPT:
            raise TypeError(
                f"{type(owner).__name__}: its kernel {kernel!r} keeps the weight in a layout of its own, which cannot be "
                f"read back; load the model with a kernel that keeps the file's layout ({', '.join(LAYOUT_KEPT[1:])}), "
                'such as GPTQConfig(..., backend="torch")'
            )
        with torch.no_grad():
            weight: Tensor = self.dequantized(owner)
        return weight

    def dequantized(self, layer: object) -> Tensor:
        """The weight (out, in), in the dtype of the scales."""
        raise NotImplementedError

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        raise NotImplementedError(f"{self.name} rounds weights with data that is not here")

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        raise NotImplementedError("never written")

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        raise NotImplementedError("never written")


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Words (n bits / 32, m) -> integers (n, m) of `bits` bits, int32, in the order of the bits.

    Raises:
        ValueError: integers of so many bits fill no whole number of words.
    """
    words, columns = packed.shape
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
        parts: Tensor = (packed[:, None] >> shifts[:, None]) & (2**bits - 1)  # (words, 32 / bits, m)
        return parts.reshape(-1, columns)
    if words % bits:
        raise ValueError(f"{words} words of 32 bits hold no whole number of runs of 32 integers of {bits} bits")
    shifts = torch.arange(32, device=packed.device, dtype=torch.int32)
    stream = ((packed[:, None] >> shifts[:, None]) & 1).reshape(-1, bits, columns)  # bit by bit: some cross words
    places = 2 ** torch.arange(bits, device=packed.device, dtype=torch.int32)
    return (stream * places[:, None]).sum(1, dtype=torch.int32)
