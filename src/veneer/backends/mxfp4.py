"""transformers' own 4-bit floats: the fused experts of gpt-oss (OCP Microscaling Formats v1.0, 2023), as its kernels hold
them in memory.

`gate_up_proj` and `down_proj` are no tensors of torch but of the kernels' library: bytes of two entries each, in a layout
that suits the GPU, with one exponent (a byte) for 32 inputs in `..._precision_config`. W is (experts, out, in). The
library quantizes with a function that it fetches from the hub, so weights are read and not written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backend
from .deferred import Deferred
from .plain import FLOATS

PROJECTIONS = ("gate_up_proj", "down_proj")


def imported_library() -> Any:
    """Transformers' module if it was imported, which every layer of it needs, else None."""
    return sys.modules.get("transformers.integrations.mxfp4")


class MXFP4(Backend):
    name = "mxfp4"
    holds = "transformers' experts in mxfp4, as its kernels hold them"

    def matches(self, owner: nn.Module, param: str) -> bool:
        return param in self.bare(owner)

    def bare(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        if imported_library() is None or not isinstance(module, imported_library().Mxfp4GptOssExperts):
            return {}
        experts: Any = module
        E, width, inner = experts.num_experts, experts.hidden_size, experts.intermediate_size
        shapes = {"gate_up_proj": (E, 2 * inner, width), "down_proj": (E, width, inner)}
        # Without it nothing was loaded: the weights are placeholders still.
        return {p: s for p, s in shapes.items() if getattr(module, f"{p}_precision_config") is not None}

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        dtype: torch.dtype = getattr(owner, f"{param}_bias").dtype
        return dtype if dtype in FLOATS else torch.bfloat16

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        found: Tensor = getattr(owner, param).storage.data
        return found

    def read(self, owner: nn.Module, param: str) -> Tensor:
        return dequantize_mxfp4(*packed_parts(owner, param), self.dtype(owner, param))

    def used(self, owner: nn.Module, param: str) -> Tensor:
        dtype = self.dtype(owner, param)
        parts = cache(lambda: packed_parts(owner, param))  # unpacked from the layout of the GPU once a call

        def make(expert: int | None, dtype: torch.dtype) -> Tensor:
            blocks, scales = parts()
            if expert is None:
                return dequantize_mxfp4(blocks, scales, dtype)
            return dequantize_mxfp4(blocks[expert, None], scales[expert, None], dtype)[0]

        device = self.storage(owner, param).device
        return Deferred(make, torch.Size(self.bare(owner)[param]), dtype, device)

    def can_write(self, owner: nn.Module, param: str) -> bool:
        return False

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        raise NotImplementedError(f"{self.name} is quantized by a function that transformers fetches from the hub")

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        raise NotImplementedError("never written")

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        raise NotImplementedError("never written")

    def settle(self, module: nn.Module) -> None:
        """Give the experts a differentiable forward: the kernel has no backward, and does not raise."""
        if imported_library() is not None and type(module) is imported_library().Mxfp4GptOssExperts:
            from .mxfp4_experts import Mxfp4GptOssExperts

            module.__class__ = Mxfp4GptOssExperts
            module.__dict__.update(_veneer_backend=self, _veneer_projections=PROJECTIONS)

    def plain(
        self, module: nn.Module, config: object, value: Callable[[str], Tensor], dtype: torch.dtype | None
    ) -> nn.Module:
        from .mxfp4_experts import plain_experts

        values = {p: value(p).to(dtype or self.dtype(module, p)) for p in PROJECTIONS}
        return plain_experts(module, config, values, dtype or self.dtype(module, "down_proj"))


def packed_parts(owner: nn.Module, param: str) -> tuple[Tensor, Tensor]:
    """Bytes (experts, out, in / 32, 16) and exponents (experts, out, in / 32), as a checkpoint has them."""
    parts = []
    for held in (getattr(owner, param), getattr(owner, f"{param}_precision_config").weight_scale):
        storage = held.storage
        parts.append(storage.layout.unswizzle_data(storage.data).mT)  # (experts, out, in / 2), (experts, out, in / 32)
    values, scales = parts
    return values.reshape(*scales.shape, -1), scales


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes and exponents -> (experts, out, in), which float16's range may not hold."""
    with torch.no_grad():
        value: Tensor = imported_library().convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # (experts, in, out)
    return value.mT
