"""nn.Linear, transformers' Conv1D (GPT-2), which is a linear layer that stores its weight transposed, and the linear
layers of libraries that store their weights in other ways.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..backends import linear_of
from ..backends.base import held_tensor, tensor_of
from ..distributed import sharding
from .geometry import Geometry, Weight
from .kind import LayerKind


class Linear(LayerKind):
    name = "Linear"
    packable = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        assert isinstance(owner, nn.Linear)
        return Geometry(owner.in_features, owner.out_features, bias=owner.bias is not None)

    def own_forward(self) -> Any:
        return nn.Linear.forward


class PackedLinear(LayerKind):
    """What a backend says is a linear layer; its weight may be a buffer, or several."""

    name = "PackedLinear"
    packable = True

    def matches(self, module: nn.Module) -> bool:
        return linear_of(module) is not None

    def weight_of(self, module: nn.Module) -> str:
        found = linear_of(module)
        assert found is not None
        return found[0]

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        found = linear_of(owner)
        assert found is not None
        return Geometry(found[1], found[2], bias=held_tensor(owner, self.bias) is not None)


class Conv1D(LayerKind):
    name = "Conv1D"

    def matches(self, module: nn.Module) -> bool:
        library = sys.modules.get("transformers.pytorch_utils")
        return library is not None and isinstance(module, library.Conv1D)

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        shape = sharding.shape_of(tensor_of(owner, param))
        return Geometry(shape[0], shape[1], bias=owner._parameters.get("bias") is not None)

    def own_forward(self) -> Any:
        return sys.modules["transformers.pytorch_utils"].Conv1D.forward

    def canonical(self, site: Weight, stored: Tensor) -> Tensor:
        return stored.T  # (in, out) -> (out, in)

    def restored(self, site: Weight, matrix: Tensor) -> Tensor:
        return matrix.T
