"""What a layer kind is: a weight seen as a matrix, and how an operator acts on the layer's activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.operators import Operator
from ..algebra.recursion import Branches
from ..algebra.sums import Sum

if TYPE_CHECKING:
    from ..algebra.recursion import Term
    from ..injection.dispatch import AdaptedState
    from .geometry import Geometry
    from .site import Site

    Links = Sequence[Term | Branches]
    Function = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # input -> output, and the bias in it


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

    def widen(self, site: Site, stored: Tensor) -> int:
        """Groups of the layer once it holds `stored` as its weight."""
        return site.groups

    def canonical(self, site: Site, stored: Tensor) -> Tensor:
        """The stored weight as a matrix (out, in)."""
        return stored

    def restored(self, site: Site, matrix: Tensor) -> Tensor:
        """Inverse of `canonical`."""
        return matrix

    # The recursion on matrices: merging, and layers that can only run with an effective weight.

    def compose(self, site: Site, links: Links, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W, b -> L (W R + Delta), L b + shift for each link in turn; weight is canonical (out, in)."""
        for link in links:
            if isinstance(link, Branches):  # W + sum_i w_i (W_i - W)
                start = (weight, bias)
                for share, branch in link.branches:
                    one, one_bias = self.compose(site, branch, *start)
                    weight = weight + share * (one - start[0])
                    if bias is not None and one_bias is not None and start[1] is not None:
                        bias = bias + share * (one_bias - start[1])
                continue
            if link.right is not None:
                weight = self.times_right(site, weight, link.right)
            if link.delta is not None:
                weight = weight + self.delta_matrix(site, link.delta, weight)
            if link.left is not None:
                weight = link.left.lmul(weight)
                if bias is not None and link.left.scales_bias:
                    bias = link.left.apply(bias)
            if link.shift is not None:
                if bias is None:
                    raise ValueError(
                        f"{site.name}: the adapter adds a bias, but {type(site.owner).__name__} has none to merge it "
                        "into; keep the adapter unmerged, or train it with lora_bias=False"
                    )
                bias = bias + link.shift.to(bias.dtype)
            if link.post is not None:
                raise ValueError(f"{site.name}: this method is no linear map of the weight and cannot be merged")
        return weight, bias

    def times_right(self, site: Site, weight: Tensor, op: Operator) -> Tensor:
        return op.rmul(weight)

    def delta_matrix(self, site: Site, op: Operator, weight: Tensor) -> Tensor:
        return op.dense().to(weight.dtype)

    def lazy(self, site: Site, links: Links) -> Tensor | None:
        """The effective weight in the layer's own layout, not formed; None where it has to be."""
        return None

    # The recursion on activations: f_{i+1}(x) = L (f_i(R x) + Delta x) + shift.

    def forward(
        self, site: Site, state: AdaptedState, target: nn.Module, links: Links, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run the layer with its adapters. The layer's first argument is its input."""
        if not args:  # called by keyword
            name = next(iter(kwargs))
            kwargs = dict(kwargs)
            args = (kwargs.pop(name),)
        x, *rest = args
        bias = site.current_bias()

        def base(x: Tensor) -> tuple[Tensor, Tensor | None]:
            return state.call(target, x, *rest, **kwargs), bias

        return self.chain(site, state, target, links, base, x)[0]

    def chain(
        self, site: Site, state: AdaptedState, target: nn.Module, links: Links, f: Function, x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`links` around f, at x: the output, and the bias in it."""
        if not links:
            return f(x)
        *before, link = links
        if isinstance(link, Branches):  # f + sum_i w_i (f_i - f)
            start = self.chain(site, state, target, before, f, x)

            def known(z: Tensor) -> tuple[Tensor, Tensor | None]:
                return start if z is x else self.chain(site, state, target, before, f, z)

            y, bias = start
            for share, branch in link.branches:
                one, one_bias = self.chain(site, state, target, branch, known, x)
                y = y + share * (one - start[0])
                if bias is not None and one_bias is not None and start[1] is not None:
                    bias = bias + share * (one_bias - start[1])
            return y, bias
        training = target.training
        z = x
        if link.right is not None:
            z = self.right(site, link.right.sample() if training else link.right, x)
        y, bias = self.chain(site, state, target, before, f, z)
        if link.delta is not None:
            op = link.delta.sample() if training else link.delta
            y = y + self.delta(site, op, x, target, state, training)
        if link.left is not None:
            op = link.left.sample() if training else link.left
            if bias is None or op.scales_bias:
                y = self.left(site, op, y)
                bias = bias if bias is None else op.apply(bias)
            else:
                b = self.spread(bias.to(y.dtype), y)
                y = self.left(site, op, y - b) + b
        if link.shift is not None:
            y = y + self.spread(link.shift.to(y.dtype), y)
            bias = bias if bias is None else bias + link.shift.to(bias.dtype)
        if link.post is not None:
            y = link.post(x, y)
        return y, bias

    def delta(
        self, site: Site, op: Operator, x: Tensor, target: nn.Module, state: AdaptedState, training: bool
    ) -> Tensor:
        """Delta x, in the layout of the layer's output."""
        if isinstance(op, Sum):
            y = self.delta(site, op.terms[0], x, target, state, training)
            for term in op.terms[1:]:
                y = y + self.delta(site, term, x, target, state, training)
            return y
        if training and op.dropout:
            x = F.dropout(x, op.dropout)
        return op.apply(x)

    def left(self, site: Site, op: Operator, y: Tensor) -> Tensor:
        """L y, on the axis of output channels."""
        return op.apply(y)

    def right(self, site: Site, op: Operator, x: Tensor) -> Tensor:
        """R x, on the axis of input channels."""
        return op.apply(x)

    def spread(self, vector: Tensor, y: Tensor) -> Tensor:
        """A vector (out,) shaped so that it broadcasts over y."""
        return vector
