"""AWQ's layers in their GEMM layout (Lin et al. 2023, arxiv.org/abs/2306.00978), of 4 bits.

qweight (in, out / 8) and qzeros (groups, out / 8) are packed along the outputs, scales are (groups, out). Of 8 outputs in
a row, the even ones come first in a word: 0 2 4 6 1 3 5 7. Inputs are in groups one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import held_tensor
from .packed import Packed, unpack_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each place in a word holds


class AWQ(Packed):
    name = "AWQ"
    holds = "AWQ's packed integers"

    def is_mine(self, owner: nn.Module) -> bool:
        layer: Any = owner
        packed = layer.qweight
        # What is packed along the outputs; the GEMV layouts are packed along the inputs.
        return held_tensor(owner, "g_idx") is None and packed.shape == (layer.in_features, layer.out_features // 8)

    def dequantized(self, layer: Any) -> Tensor:
        q, zeros = unpack_awq(layer.qweight), unpack_awq(layer.qzeros)  # (in, out), (groups, out)
        size = layer.in_features // zeros.shape[0]
        q, zeros = q.view(-1, size, q.shape[1]), zeros[:, None]  # (groups, size, out), (groups, 1, out)
        weight: Tensor = ((q - zeros) * layer.scales[:, None]).flatten(0, 1).T.contiguous()  # (out, in)
        return weight


def unpack_awq(words: Tensor) -> Tensor:
    """Words (n, m / 8) -> the integers (n, m) of 4 bits in their order, int32."""
    q = unpack_rows(words.T, 4).T.reshape(words.shape[0], -1, 8)  # (n, m / 8, 8)
    places = torch.tensor([ORDER.index(i) for i in range(8)], device=words.device)
    return q[..., places].flatten(1)
