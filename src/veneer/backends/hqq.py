"""HQQ's layers: half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog).

`HQQLinear` is not an nn.Linear. It holds the packed integers as the parameter `W_q` and all the rest, scales and zeros too,
in the dict `meta`; its bias is a plain attribute. Its forward multiplies by the dequantized weight, and its backward by
the same.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backend


class HQQ(Backend):
    name = "HQQ"
    holds = "HQQ's packed integers"

    def matches(self, owner: nn.Module, param: str) -> bool:
        library = sys.modules.get("hqq.core.quantize")
        return library is not None and isinstance(owner, library.HQQLinear) and param == "W_q"

    def linear(self, module: nn.Module) -> tuple[str, int, int] | None:
        if not self.matches(module, "W_q"):
            return None
        layer: Any = module
        return "W_q", layer.in_features, layer.out_features

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        layer: Any = owner
        dtype: torch.dtype = layer.compute_dtype
        return dtype

    def settle(self, module: nn.Module) -> None:
        """Cut the bias off the graph in which the layer copied it: it would be trained, and could not be copied."""
        if self.matches(module, "W_q"):
            layer: Any = module
            if layer.bias is not None and layer.bias.grad_fn is not None:
                layer.bias = layer.bias.detach()

    def read(self, owner: nn.Module, param: str) -> Tensor:
        layer: Any = owner
        with torch.no_grad():
            weight: Tensor = layer.dequantize()
        return weight

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        layer: Any = owner
        token = (layer.W_q.data, layer.meta)
        plain = nn.Linear(1, 1, bias=False)
        plain.weight = nn.Parameter(value.detach().to(layer.W_q.device), requires_grad=False)
        config = {**layer.quant_config, "offload_meta": layer.offload_meta}  # which the layer took out of its own
        library = sys.modules["hqq.core.quantize"]
        made = library.HQQLinear(plain, config, compute_dtype=layer.compute_dtype, device=str(layer.device))
        layer.W_q.data, layer.meta = made.W_q.data, made.meta
        return token

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        layer: Any = owner
        layer.W_q.data, layer.meta = token  # type: ignore[misc]

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        layer: Any = owner
        now = (layer.W_q.data, layer.meta)
        self.restore(owner, param, token)
        try:
            return self.read(owner, param)
        finally:
            self.restore(owner, param, now)
