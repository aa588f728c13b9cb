"""HQQ's layers: half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog).

`HQQLinear` is no nn.Linear. It holds the packed integers as the parameter `W_q` and all the rest, scales and zeros too,
in the dict `meta`; its bias is a plain attribute. Its forward multiplies by the dequantized weight, and its backward by
the same.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import Backend


class HQQ(Backend):
    name = "HQQ"

    def matches(self, owner: nn.Module, param: str) -> bool:
        library = sys.modules.get("hqq.core.quantize")
        return library is not None and isinstance(owner, library.HQQLinear)

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        dtype: torch.dtype = owner.compute_dtype  # type: ignore[assignment]
        return dtype

    def read(self, owner: nn.Module, param: str) -> Tensor:
        if param == "bias":
            bias: Tensor = owner.bias  # type: ignore[assignment]
            return bias
        with torch.no_grad():
            weight: Tensor = owner.dequantize()  # type: ignore[operator]
        return weight

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        if param == "bias":
            old = owner.bias
            owner.bias = value.to(old)  # type: ignore[arg-type,call-overload]
            return old
        packed: Any = owner.W_q
        token = (packed.data, owner.meta)
        made = self.quantized(owner, value)
        packed.data, owner.meta = made.W_q.data, made.meta
        return token

    def quantized(self, owner: Any, value: Tensor) -> Any:
        """A layer with the options of `owner` and the weight `value` (out, in)."""
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = nn.Parameter(value.detach().to(owner.W_q.device), requires_grad=False)
        config = {**owner.quant_config, "offload_meta": owner.offload_meta}  # which the layer took out of its own
        library = sys.modules["hqq.core.quantize"]
        return library.HQQLinear(plain, config, compute_dtype=owner.compute_dtype, device=str(owner.device))

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        if param == "bias":
            owner.bias = token  # type: ignore[assignment]
            return
        layer: Any = owner
        layer.W_q.data, layer.meta = token  # type: ignore[misc]
