"""What a method may say: the words of the recursion, and how its tensors begin, load and are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..algebra.operator import Operator
from ..layers.site import Site

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AtSite:
    """A method's share of one site after a step: its tensors, to be changed in place, and gradients of the trained ones."""

    site: Site
    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Hooks:
    """The hooks of a method, none of which is called unless its class defines it.

        W' = L (W R + Delta)            y = L (f(R x) + Delta x) + shift,   then post(x, y)

    `p` holds the tensors that the method declares, by their keys; `site` is the place that they are at.
    """

    def init(self, site: Site) -> dict[str, Tensor]:
        """Return this method's fresh tensors at `site`, in the shapes of the file."""
        raise NotImplementedError

    def init_shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return tensors that all sites of the adapter share; `p` holds them at every site."""
        return {}

    def loaded(self, site: Site) -> dict[str, Tensor]:
        """The tensors of an adapter that comes from a file; those that have a name are taken from it."""
        return self.init(site)

    def exported(self, p: Tensors, site: Site) -> dict[str, Tensor] | None:
        """What is written to the file if that is not what is trained, under the keys of `tensors`."""
        return None

    def delta(self, p: Tensors, site: Site) -> Operator | None:
        """Delta in W' = L (W R + Delta)."""

    def left(self, p: Tensors, site: Site) -> Operator | None:
        """L, a square operator on the output side."""

    def right(self, p: Tensors, site: Site) -> Operator | None:
        """R, a square operator on the input side."""

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        """A vector (out,) added to the output."""

    def post(self, p: Tensors, site: Site, x: object, y: Tensor) -> Tensor:
        """What no linear operator can say: maps the site's input and output to its new output.

        `x` is the input tensor of a layer; of a module (`acts_on = "modules"`) it is all its arguments, by name. If
        `sites_of` gave places in blocks, it also holds the residual stream, under the name `site.spot.residual`.
        """
        return y

    def prompt(self, p: Tensors, site: Site, tasks: Tensor | None) -> Tensor | None:
        """Embeddings of virtual tokens in front of a stack's input, (T, width), or (batch, T, width) by task."""

    def prefix(self, p: Tensors, site: Site) -> Tensor | None:
        """Keys and values of virtual positions in a stack's layers, (layers, 2, heads, P, head width)."""

    def objective(self, logits: Tensor, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The training loss, from logits (batch, T + tokens, vocabulary) and labels (batch, tokens)."""
        raise NotImplementedError

    # While it is trained: called around the steps of the optimizer that holds its tensors, with whole values.

    def project(self, grads: Tensors, p: Tensors, site: Site) -> dict[str, Tensor]:
        """The gradients to use in place of `grads` (those of its trained tensors here), of those that change."""
        return {}

    def penalty(self, p: Tensors, site: Site) -> Tensor | None:
        """A scalar added to the loss: its gradient is added before the step, unless the loop added `veneer.penalty`."""

    def constrain(self, p: Tensors, site: Site) -> dict[str, Tensor]:
        """The nearest allowed values of its trained tensors after a step, of those that change."""
        return {}

    def step(self, t: int, places: Sequence[AtSite]) -> None:
        """Act after the optimizer's t-th step (from 1), on all sites together; `t` is saved with checkpoints.

        Tensors are changed in place; what is to be kept between steps is a declared constant.
        """
