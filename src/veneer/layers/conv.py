"""Convolutions: nn.Conv1d, Conv2d, Conv3d, grouped ones, and subclasses that do their own padding in forward.

The matrix is (out, in * kernel). An operator acts through the layer's own forward run on a stand-in with
another weight, so stride, padding and whatever the subclass does apply to it as they do to the base.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.block_diagonal import regroup_blocks, ungroup_blocks
from ..algebra.hadamard import Hadamard
from ..algebra.low_rank import Factored
from ..algebra.operator import Operator
from ..algebra.operators import Diagonal, broadcast_along
from ..algebra.recursion import Terms, walk_terms
from ..algebra.sums import Sum
from ..backends.base import put_tensor
from .geometry import Geometry, Weight
from .kind import Call, LayerKind
from .shallow_copy import shallow_copy

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(LayerKind):
    name = "Conv"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, CONVS)

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        assert isinstance(owner, CONVS)
        return Geometry(
            owner.in_channels,
            owner.out_channels,
            kernel=tuple(owner.kernel_size),
            groups=owner.groups,
            bias=owner.bias is not None,
        )

    def canonical(self, site: Weight, stored: Tensor) -> Tensor:
        flat = stored.flatten(1)  # (out, in / groups * kernel)
        return flat if flat.shape[1] == site.patch else ungroup_blocks(flat, site.groups)

    def restored(self, site: Weight, matrix: Tensor) -> Tensor:
        """(out, in * kernel) -> (out, in / groups, *kernel) where the groups hold, else (out, in, *kernel)."""
        grouped = regroup_blocks(matrix, site.groups) if site.groups > 1 else matrix
        kept = matrix if grouped is None else grouped
        return kept.reshape(site.fan_out, -1, *site.kernel)

    def times_right(self, site: Weight, weight: Tensor, op: Operator) -> Tensor:
        if op.size == site.fan_in:  # one factor a channel: repeat it over the kernel
            taps = math.prod(site.kernel)
            if isinstance(op, Diagonal):
                return weight * op.v.to(weight.dtype).repeat_interleave(taps)
            by_channel = weight.view(site.fan_out, site.fan_in, taps).transpose(1, 2)  # (out, taps, in)
            return op.rmul(by_channel).transpose(1, 2).reshape(weight.shape)
        return op.rmul(weight)

    def delta_matrix(self, site: Weight, op: Operator, weight: Tensor) -> Tensor:
        if isinstance(op, Sum):
            total = self.delta_matrix(site, op.terms[0], weight)
            for term in op.terms[1:]:
                total = total + self.delta_matrix(site, term, weight)
            return total
        dense = op.dense().to(weight.dtype)
        grouped = site.groups > 1 and dense.shape[1] * site.groups == site.patch
        return ungroup_blocks(dense, site.groups) if grouped else dense

    def forward(
        self, site: Weight, call: Call, target: nn.Module, terms: Terms, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        # An R over whole patches does not commute with the convolution: run with the effective weight instead.
        if any(link.right is not None and link.right.size != site.fan_in for link in walk_terms(terms)):
            for link in walk_terms(terms):
                if target.training:
                    link.right = link.right and link.right.sample()
                    link.delta = link.delta and link.delta.sample()
            matrix, bias = self.compose(site, terms, site.current_weight(), site.current_bias())
            return call(self.with_weight(target, site, matrix, bias), *args, **kwargs)
        return super().forward(site, call, target, terms, args, kwargs)

    def with_weight(self, target: nn.Module, site: Weight, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        """The layer with another weight (out, in * kernel), ungrouped."""
        double = shallow_copy(target, groups=1)
        put_tensor(double, "weight", matrix.reshape(matrix.shape[0], -1, *site.kernel))
        put_tensor(double, "bias", bias)
        return double

    def delta(self, site: Weight, op: Operator, x: Tensor, target: nn.Module, call: Call, training: bool) -> Tensor:
        if isinstance(op, Sum):
            return super().delta(site, op, x, target, call, training)
        channel = -1 - len(site.kernel)
        if isinstance(op, Hadamard) and site.groups == 1 and op.thin:
            op = op.factored()
        if isinstance(op, Factored):
            if training and op.dropout:
                x = F.dropout(x, op.dropout)
            h: Tensor = call(self.with_weight(target, site, op.A.to(x.dtype), None), x)  # (N, r, *spatial)
            folded = op.folds(h.numel() // h.shape[channel])
            B = (op.folded_B() if folded else op.B).to(x.dtype)
            B = B.reshape(*B.shape, *(1,) * len(site.kernel))  # (out, r / groups, 1...)
            pointwise = POINTWISE[len(site.kernel)]
            if folded:
                return pointwise(h, B)
            return op.finish(pointwise(op.middle(h, channel), B, groups=op.groups), channel)
        dense = op.dense().to(x.dtype)
        double = self.with_weight(target, site, dense, None)
        if dense.shape[1] * site.groups == site.patch:
            double.__dict__["groups"] = site.groups
        summed: Tensor = call(double, x)
        return summed

    def left(self, site: Weight, op: Operator, y: Tensor) -> Tensor:
        return self.on_channels(op, y, -1 - len(site.kernel))

    def right(self, site: Weight, op: Operator, x: Tensor) -> Tensor:
        return self.on_channels(op, x, -1 - len(site.kernel))

    def on_channels(self, op: Operator, x: Tensor, axis: int) -> Tensor:
        if isinstance(op, Diagonal):
            return x * broadcast_along(op.v.to(x.dtype), axis, x.ndim)
        return op.apply(x.movedim(axis, -1)).movedim(-1, axis)

    def spread(self, vector: Tensor, y: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * (y.ndim - 2)) if y.ndim > 2 else vector

    def widen(self, site: Weight, stored: Tensor) -> int:
        """Groups of the layer once it holds `stored`; warns where merging makes it dense."""
        if site.groups == 1 or stored.shape[1] * site.groups == site.fan_in:
            return site.groups
        warnings.warn(
            f"{site.name}: the adapter's delta crosses the {site.groups} groups of this convolution, so while it is "
            f"merged the layer is ungrouped and its weight {tuple(stored.shape)} instead of "
            f"{tuple(site.stored().shape)}; leave the layer out of target_modules to keep its shape",
            stacklevel=2,
        )
        return 1
