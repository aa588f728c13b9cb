"""Bare parameters: weights that a module uses on its own terms, so operators reach them only as an
effective weight. Fused experts (3-D), attention in-projections, single matrices, and biases (1-D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..algebra.low_rank import Factored
from ..algebra.operator import Operator
from ..algebra.recursion import Terms
from ..backends import bare_of
from ..distributed import sharding
from .geometry import Geometry, Weight
from .kind import LayerKind
from .lazy_weight import lazy_weight


class Parameter(LayerKind):
    """A parameter of 1 to 3 dimensions. 3-D ones are stacked experts, (experts, out, in) in transformers 5;
    a module with `is_transposed` (GPT-OSS) stores (experts, in, out).
    """

    name = "parameter"
    by_parameter = True

    def matches(self, module: nn.Module) -> bool:
        return False  # named through target_parameters only

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        found = owner._parameters.get(param)
        shape = bare_of(owner)[param] if found is None else tuple(sharding.shape_of(found))
        if len(shape) == 1:
            return Geometry(1, shape[0], bare=True)
        if len(shape) == 2:
            return Geometry(shape[1], shape[0], bare=True)
        if len(shape) == 3:
            experts, a, b = shape
            fan_out, fan_in = (b, a) if self.transposed(owner) else (a, b)
            return Geometry(fan_in, fan_out, experts=experts, bare=True)
        raise ValueError(
            f"{type(owner).__name__}.{param} has {len(shape)} dimensions; target_parameters takes matrices (out, in) "
            "and stacked experts (experts, out, in)"
        )

    def transposed(self, owner: nn.Module) -> bool:
        return bool(getattr(owner, "is_transposed", False))

    def canonical(self, site: Weight, stored: Tensor) -> Tensor:
        if stored.ndim == 1:
            return stored[:, None]  # (n,) -> (n, 1)
        return stored.transpose(-1, -2) if stored.ndim == 3 and self.transposed(site.owner) else stored

    def restored(self, site: Weight, matrix: Tensor) -> Tensor:
        if matrix.shape[-1] == 1 and site.fan_in == 1 and not site.experts:
            return matrix[:, 0]
        return matrix.transpose(-1, -2) if matrix.ndim == 3 and self.transposed(site.owner) else matrix

    def delta_matrix(self, site: Weight, op: Operator, weight: Tensor) -> Tensor:
        if site.experts and isinstance(op, Factored):
            # (experts, out, r) (experts, r, in) -> (experts, out, in)
            return torch.bmm(op.B.to(weight.dtype), op.A.to(weight.dtype)) * op.scale
        return op.dense().to(weight.dtype)

    def lazy(self, site: Weight, terms: Terms) -> Tensor | None:
        if not self.by_parameter:  # nn.MultiheadAttention needs the weight itself
            return None
        stored = site.backend.used(site.owner, site.param)
        return lazy_weight(stored, terms, flipped=stored.ndim == 3 and self.transposed(site.owner))


class InProjection(Parameter):
    """The packed query, key and value projection of nn.MultiheadAttention, (3 * width, width)."""

    name = "MultiheadAttention.in_proj"
    by_parameter = False
    param = "in_proj_weight"
    bias = "in_proj_bias"

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        weight = owner._parameters[param]
        if weight is None:
            raise TypeError(
                "nn.MultiheadAttention with different query, key and value widths keeps three weights; name them in "
                "target_parameters (q_proj_weight, k_proj_weight, v_proj_weight) instead of the module"
            )
        shape = sharding.shape_of(weight)
        return Geometry(shape[1], shape[0], bias=owner._parameters[self.bias] is not None, bare=True)


class OutProjection(Parameter):
    """The output projection of nn.MultiheadAttention: a Linear whose forward the attention never calls."""

    name = "MultiheadAttention.out_proj"
    low_rank_factor = 2.0  # peft up to 0.21.2 adds this projection's delta twice, in forward and in merge
    by_parameter = False

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        assert isinstance(owner, nn.Linear)
        return Geometry(owner.in_features, owner.out_features, bias=owner.bias is not None, bare=True)
