"""GPTQ's layers (Frantar et al. 2022, arxiv.org/abs/2210.17323), as gptqmodel and auto-gptq keep them in memory.

For b bits: qweight (in b / 32, out), packed along the inputs; qzeros (groups, out b / 32), packed along the outputs;
scales (groups, out); g_idx (in,), the group of each input. Files of the first version hold the zeros less one, and a
layer returns the current one from `qzero_format()`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import held_tensor
from .packed import Packed, unpack_rows


class GPTQ(Packed):
    name = "GPTQ"
    holds = "GPTQ's packed integers"

    def is_mine(self, owner: nn.Module) -> bool:
        return held_tensor(owner, "g_idx") is not None

    def dequantized(self, layer: Any) -> Tensor:
        bits, g_idx = layer.bits, layer.g_idx.long()  # (in,)
        q = unpack_rows(layer.qweight, bits)[: layer.in_features]  # (in, out)
        zeros = unpack_rows(layer.qzeros.T, bits).T[:, : layer.out_features]  # (groups, out)
        version = layer.qzero_format() if hasattr(layer, "qzero_format") else 1
        if version == 1:
            zeros = (zeros + 1) & (2**bits - 1)  # less one in the file, wrapped around
        scales = layer.scales[:, : layer.out_features]  # (groups, out)
        weight: Tensor = ((q - zeros[g_idx]) * scales[g_idx]).T.contiguous()  # (out, in)
        return weight
