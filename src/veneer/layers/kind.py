"""What a layer kind is: a weight seen as a matrix, and how an operator acts on the layer's activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.operator import Operator
from ..algebra.recursion import Post, Semantics, Terms, evaluate
from ..algebra.sums import Sum
from .geometry import Weight

if TYPE_CHECKING:
    from .geometry import Geometry


Call = Callable[..., Any]  # the base layer's own forward, on the layer itself or on a shallow copy of it
Weights = tuple[Tensor, Tensor | None]  # a matrix (out, in) and a bias (out,); or an output and the bias in it


class LayerKind(ABC):
    """One kind of layer. Stateless; subclasses say how its weight is laid out and how operators act."""

    name: str
    param = "weight"
    bias = "bias"
    whole = False  # the adapter is a copy of the module
    low_rank_factor = 1.0  # what a low-rank delta is multiplied by, so that peft's files mean the same here
    by_parameter = False  # a module can have several sites of this kind, one a parameter
    packable = False  # the weight may be stored in any way: only the layer's own forward uses it

    def weight_of(self, module: nn.Module) -> str:
        """Name of the weight on `module`."""
        return self.param

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is of this kind."""

    @abstractmethod
    def measure(self, owner: nn.Module, param: str) -> Geometry:
        """The weight's geometry, read from the module without reading the weight."""

    def check(self, owner: nn.Module, param: str, name: str) -> None:
        """Raise if this particular layer cannot be adapted; `name` says where it is."""

    def own_forward(self) -> Any:
        """The forward that is x W^T + b and nothing more, or None for kinds of layers that are something else."""
        return None

    def widen(self, site: Weight, stored: Tensor) -> int:
        """Groups of the layer once it holds `stored` as its weight."""
        return site.groups

    def canonical(self, site: Weight, stored: Tensor) -> Tensor:
        """The stored weight as a matrix (out, in)."""
        return stored

    def restored(self, site: Weight, matrix: Tensor) -> Tensor:
        """Inverse of `canonical`."""
        return matrix

    # The recursion on matrices: merging, and layers that can only run with an effective weight.

    def compose(self, site: Weight, terms: Terms, weight: Tensor, bias: Tensor | None) -> Weights:
        """W, b -> L (W R + Delta), L b + shift for each term in turn; weight is canonical (out, in)."""
        return evaluate(terms, MatrixSemantics(self, site), None, lambda _: (weight, bias))

    def times_right(self, site: Weight, weight: Tensor, op: Operator) -> Tensor:
        return op.rmul(weight)

    def delta_matrix(self, site: Weight, op: Operator, weight: Tensor) -> Tensor:
        return op.dense().to(weight.dtype)

    def lazy(self, site: Weight, terms: Terms) -> Tensor | None:
        """The effective weight in the layer's own layout, not formed; None where it has to be."""
        return None

    # The recursion on activations: f_{i+1}(x) = L (f_i(R x) + Delta x) + shift.

    def forward(
        self, site: Weight, call: Call, target: nn.Module, terms: Terms, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer with its adapters. The layer's first argument is its input."""
        if not args:  # called by keyword
            name = next(iter(kwargs))
            kwargs = dict(kwargs)
            args = (kwargs.pop(name),)
        x, *rest = args
        bias = site.current_bias()  # (out,) or None
        semantics = ActivationSemantics(self, site, call, target)
        return evaluate(terms, semantics, x, lambda z: (call(target, z, *rest, **kwargs), bias))[0]

    def delta(self, site: Weight, op: Operator, x: Tensor, target: nn.Module, call: Call, training: bool) -> Tensor:
        """Delta x, in the layout of the layer's output."""
        if isinstance(op, Sum):
            y = self.delta(site, op.terms[0], x, target, call, training)
            for term in op.terms[1:]:
                y = y + self.delta(site, term, x, target, call, training)
            return y
        if training and op.dropout:
            x = F.dropout(x, op.dropout)
        return op.apply(x)

    def left(self, site: Weight, op: Operator, y: Tensor) -> Tensor:
        """L y, on the axis of output channels."""
        return op.apply(y)

    def right(self, site: Weight, op: Operator, x: Tensor) -> Tensor:
        """R x, on the axis of input channels."""
        return op.apply(x)

    def spread(self, vector: Tensor, y: Tensor) -> Tensor:
        """A vector (out,) shaped so that it broadcasts over y."""
        return vector


class MatrixSemantics(Semantics[None, Weights]):
    """Terms as changes of a layer's matrix (out, in) and bias (out,)."""

    def __init__(self, kind: LayerKind, site: Weight) -> None:
        self.kind, self.site = kind, site

    def right(self, op: Operator, inner: Callable[[None], Weights], x: None) -> Weights:
        weight, bias = inner(x)
        return self.kind.times_right(self.site, weight, op), bias

    def delta(self, op: Operator, x: None, y: Weights) -> Weights:
        weight, bias = y
        return weight + self.kind.delta_matrix(self.site, op, weight), bias

    def left(self, op: Operator, y: Weights) -> Weights:
        weight, bias = y
        return op.lmul(weight), op.apply(bias) if bias is not None and op.scales_bias else bias

    def shift(self, vector: Tensor, y: Weights) -> Weights:
        weight, bias = y
        if bias is None:
            raise ValueError(
                f"{self.site.name}: the adapter adds a bias, but {type(self.site.owner).__name__} has none to merge it "
                "into; keep the adapter unmerged, or train it with lora_bias=False"
            )
        return weight, bias + vector.to(bias.dtype)

    def post(self, function: Post, x: None, y: Weights) -> Weights:
        raise ValueError(f"{self.site.name}: this method is not a linear map of the weight and cannot be merged")

    def mix(self, y: Weights, share: float, branch: Weights, start: Weights) -> Weights:
        return _mix_weights(y, share, branch, start)


class ActivationSemantics(Semantics[Tensor, Weights]):
    """Terms as changes of a layer's output y, in the layout of the layer, and of the bias (out,) in it."""

    def __init__(self, kind: LayerKind, site: Weight, call: Call, target: nn.Module) -> None:
        self.kind, self.site, self.call, self.target = kind, site, call, target
        self.training = target.training

    def drawn(self, op: Operator) -> Operator:
        """The operator with its random parts drawn, if the layer is in training mode."""
        return op.sample() if self.training else op

    def right(self, op: Operator, inner: Callable[[Tensor], Weights], x: Tensor) -> Weights:
        return inner(self.kind.right(self.site, self.drawn(op), x))

    def delta(self, op: Operator, x: Tensor, y: Weights) -> Weights:
        added = self.kind.delta(self.site, self.drawn(op), x, self.target, self.call, self.training)
        return y[0] + added, y[1]

    def left(self, op: Operator, y: Weights) -> Weights:
        op, (out, bias) = self.drawn(op), y
        if bias is None or op.scales_bias:
            return self.kind.left(self.site, op, out), bias if bias is None else op.apply(bias)
        b = self.kind.spread(bias.to(out.dtype), out)
        return self.kind.left(self.site, op, out - b) + b, bias

    def shift(self, vector: Tensor, y: Weights) -> Weights:
        out, bias = y
        out = out + self.kind.spread(vector.to(out.dtype), out)
        return out, bias if bias is None else bias + vector.to(bias.dtype)

    def post(self, function: Post, x: Tensor, y: Weights) -> Weights:
        return function(x, y[0]), y[1]

    def mix(self, y: Weights, share: float, branch: Weights, start: Weights) -> Weights:
        return _mix_weights(y, share, branch, start)


def _mix_weights(y: Weights, share: float, branch: Weights, start: Weights) -> Weights:
    value, bias = y[0] + share * (branch[0] - start[0]), y[1]
    if bias is not None and branch[1] is not None and start[1] is not None:
        bias = bias + share * (branch[1] - start[1])
    return value, bias
