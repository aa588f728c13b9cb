"""Which kernel serves a layer that was taken over, for one stack of adapters. Computed when adapters change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..injection.dispatch import AdaptedState, Kernel, RowKernel, state_of
from ..injection.interceptors import FusedNetwork
from . import mixed, structure
from .around import Around, AroundOne, AroundTogether
from .around_gated import AroundGated
from .gated import GatedNetwork
from .linear import Alone, Sibling, Together
from .member import Member, gathers_alone, runs_as_linear, runs_itself

if TYPE_CHECKING:
    from ..injection.router import AdapterExpr

LIMIT = 64  # stacks of adapters whose kernels a group keeps


class Group:
    """Layers of one parent that its forward calls on the same input."""

    def __init__(self, layers: Sequence[nn.Module], parent: nn.Module) -> None:
        self.layers, self.parent = tuple(layers), parent
        self.made: dict[Any, dict[nn.Module, Sibling]] = {}

    def kernel(self, layer: nn.Module, live: tuple[AdapterExpr, ...], version: object) -> Kernel | None:
        """The kernel of one of them, for the adapters of `live`; None where no other has any of them."""
        if gathers_alone(layer):
            return None
        ends = self.made.get((live, version))
        if ends is None:
            found = [(one, member_of(one, live)) for one in self.layers]
            members = [(one, member) for one, member in found if member is not None]
            ends = {}
            if len(members) > 1:
                kind: Any = AroundTogether if isinstance(members[0][1], Around) else Together
                together = kind([member for _, member in members], self.parent)
                ends = {one: end for (one, _), end in zip(members, together.ends, strict=True)}
            # Another thread may do the same for other adapters, so what was found is returned and not looked up.
            made = {k: v for k, v in self.made.items() if k[1] is version}
            self.made = (made if len(made) < LIMIT else {}) | {(live, version): ends}
        return ends.get(layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": {}}


def member_of(layer: nn.Module, live: tuple[AdapterExpr, ...]) -> Member | None:
    """A layer's part in a kernel, or None where a kernel cannot say all that happens there."""
    state = state_of(layer)
    if state is None or state.main is None or not state.only_kernel:
        return None
    if not runs_as_linear(state) and not runs_itself(state):
        return None
    member = Member(state.main, live) if runs_as_linear(state) else Around(state.main, live)
    return member if member.plan() else None


def kernel_of(state: AdaptedState, layer: nn.Module, live: tuple[AdapterExpr, ...], version: object) -> Kernel | None:
    """The kernel for a layer with the adapters of `live`, or None."""
    if not live:
        return None
    if state.main is not None:
        if state.group is not None:
            found: Kernel | None = state.group.kernel(layer, live, version)
            if found is not None:
                return found
        member = member_of(layer, live)
        if isinstance(member, Around):
            return AroundOne(member)
        return None if member is None else Alone(member)
    network = state.find(FusedNetwork)
    if network is not None:
        names: Any = network.parts
        children = [layer._modules.get(name) for name in (names.gate, names.up, names.down)]
        members = [None if c is None or gathers_alone(c) else member_of(c, live) for c in children]
        around = [isinstance(m, Around) for m in members]
        if all(m is not None for m in members) and all(around) == any(around):
            kind = AroundGated if all(around) else GatedNetwork
            return kind(names, members, state)  # type: ignore[arg-type]
    return None


class Arrangement(NamedTuple):
    """Which layers of a parent can run together.

    Attributes:
        grouped: some of them see the same input.
        network: they make up a gated feed-forward network, with these names, or None.
    """

    grouped: bool
    network: structure.Gated | None


def arrange_groups(parents: Iterable[nn.Module]) -> dict[nn.Module, Arrangement]:
    """Tell layers under `parents` of their siblings; return how each parent's layers can run together."""
    return {parent: _arrange_layers(parent) for parent in parents}


def _arrange_layers(parent: nn.Module) -> Arrangement:
    children = parent._modules
    states = {n: s for n, c in children.items() if c is not None and (s := state_of(c)) is not None}
    linear = {n for n, s in states.items() if s.main is not None and runs_as_linear(s)}
    around = {n for n, s in states.items() if s.main is not None and runs_itself(s)}
    for name in linear | around:
        states[name].group = None
    base = getattr(type(parent), "_veneer_base", type(parent))
    grouped, own_forward = False, not replaced_parts(parent)
    for names in structure.find_siblings(base) if own_forward and len(linear | around) > 1 else ():
        for alike in (linear, around):
            together = [n for n in names if n in alike]
            if len(together) > 1:
                grouped = True
                group = Group([m for n in together if (m := children[n]) is not None], parent)
                for name in together:
                    states[name].group = group
    network = structure.decode_gated(base) if own_forward and max(len(linear), len(around)) > 2 else None
    if network is None or children.get(network.act) is None:
        return Arrangement(grouped, None)
    parts = {network.gate, network.up, network.down}
    return Arrangement(grouped, network if parts <= linear or parts <= around else None)


def replaced_parts(module: nn.Module) -> bool:
    """Whether the module has a forward of its own, beside that of its class."""
    state = state_of(module)
    return "forward" in module.__dict__ or (state is not None and state.instance_forward is not None)


class KernelPlanner:
    """The choice of kernels that attaching an adapter installs on the router."""

    def choose_kernel(
        self, state: AdaptedState, layer: nn.Module, live: tuple[AdapterExpr, ...], version: object
    ) -> Kernel | None:
        return kernel_of(state, layer, live, version)

    def choose_row_kernel(self, state: AdaptedState, layer: nn.Module) -> RowKernel | None:
        return mixed.kernel_of(state, layer)
