"""optimum-quanto's layers: QLinear is an nn.Linear whose weight is one of quanto's tensors, once it is frozen.

Its forward is quanto's own function of a linear layer, whose backward multiplies by the dequantized weight. Quanto's
tensors cannot be copied by `deepcopy`, nor can layers that hold them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backend, put_tensor


class Quanto(Backend):
    name = "quanto"
    holds = "optimum-quanto's frozen tensors"

    def matches(self, owner: nn.Module, param: str) -> bool:
        library = sys.modules.get("optimum.quanto.tensor")
        return library is not None and isinstance(owner._parameters.get(param), library.QTensor)

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        return self.storage(owner, param).dtype

    def read(self, owner: nn.Module, param: str) -> Tensor:
        weight: Any = owner._parameters[param]
        with torch.no_grad():
            value: Tensor = weight.dequantize()
        return value

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        layer: Any = owner
        old: Any = owner._parameters[param]
        # While a layer holds a plain weight, `qweight` is that weight quantized with the layer's own options.
        owner._parameters[param] = nn.Parameter(
            value.detach().to(device=old.device, dtype=old.dtype), requires_grad=False
        )
        try:
            with torch.no_grad():
                made = layer.qweight
        except BaseException:
            owner._parameters[param] = old
            raise
        owner._parameters[param] = nn.Parameter(made, requires_grad=False)
        return old

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        old: Any = token
        with torch.no_grad():
            value: Tensor = old.dequantize()
        return value

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        put_tensor(owner, param, token)
