"""Sites: the places of a base model that are adapted, and how a layer's forward is taken over.

The layer stays where it is. Its `__class__` becomes a generated subclass whose `forward` runs the recursion
of the adapters, so base `state_dict` keys, `isinstance`, `.weight`, tied weights and every other attribute
stay true. Adapter tensors are registered directly on the layer, because hooks that load, gather or offload
parameters (accelerate, ZeRO-3) act on a layer's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..algebra import modes
from ..distributed import offload
from ..layers.shallow_copy import rows_of_adapter, select_rows, shallow_copy
from ..prompts.objective import state_objective
from .effective_weight import with_effective_weight
from .entries import copy_name
from .router import AdapterExpr, adapter_names

if TYPE_CHECKING:
    from ..kernels.plan import Group, Kernel
    from ..kernels.structure import Gated
    from ..layers.site import Site
    from ..prompts.prompt_stack import PromptStack
    from .router import Router, Rows


CARRIED = "veneer_prefix"  # argument that brings a block the cache that gradient checkpointing takes away


class Plan(NamedTuple):
    """What serves a layer with one stack of adapters.

    Attributes:
        live: the stack.
        version: of the router, when it was made.
        kernel: what runs the layer's weights with their adapters, or None.
        whole: the same where nothing else happens at the layer.
    """

    live: tuple[AdapterExpr, ...] | None
    version: object
    kernel: Kernel | None
    whole: Kernel | None


NO_PLAN = Plan(None, None, None, None)
PLANS = 16  # kept at a layer


class AdaptedState:
    """The state of one adapted layer: its base forward and the sites whose weights it uses."""

    def __init__(self, layer: nn.Module, router: Router) -> None:
        self.base: type[nn.Module] = type(layer)
        self.router = router
        self.main: Site | None = None  # a layer whose input and output the operators act on
        self.bare: list[Site] = []  # parameters swapped for their effective value during forward
        self.door: PromptStack | None = None  # a stack into which virtual tokens go
        self.carries: tuple[str, int] | None = None  # a block's cache argument, which checkpointing takes away
        self.objective: Site | None = None  # a model whose loss an adapter says
        self.module: Site | None = None  # a module whose output is mapped as a whole
        self.opaque: Site | None = None  # a module with full copies
        self.tapped: list[Site] = []  # sites that want to know what goes into this module
        self.instance_forward: Callable[..., Any] | None = None
        self.split: tuple[Any, Any] | None = None  # how transformers' tensor parallelism splits it, and the mesh
        self.group: Group | None = None  # the layers that see the same input
        self.gated: Gated | None = None  # a gated feed-forward network, whose layers can run as one
        self.planned = NO_PLAN
        self.plans: dict[tuple[AdapterExpr, ...], Plan] = {}

    @property
    def in_use(self) -> bool:
        held = (self.main, self.module, self.opaque, self.door, self.carries, self.objective, self.gated)
        return bool(self.bare or self.tapped) or any(x is not None for x in held)

    @property
    def only_main(self) -> bool:
        """Whether the operators of its weight, or those of its layers, are all that is done here."""
        held = (self.module, self.opaque, self.door, self.carries, self.objective)
        return not (self.bare or self.tapped) and all(x is None for x in held)

    def plan(self, layer: nn.Module, live: tuple[AdapterExpr, ...]) -> Plan:
        """What serves a stack of adapters, found once until adapters change."""
        plan = self.planned
        if plan.live is not live or plan.version is not self.router.version:
            from ..kernels.plan import kernel_of

            version = self.router.version
            known = self.plans.get(live)
            if known is None or known.version is not version:
                kernel = kernel_of(self, layer, live, version)
                known = Plan(live, version, kernel, kernel if self.only_main else None)
                # A few stacks, as where one is switched on and off; another thread may do the same at once.
                kept = {k: p for k, p in self.plans.items() if p.version is version}
                self.plans = {**(kept if len(kept) < PLANS else {}), live: known}
            self.planned = plan = known._replace(live=live)  # an equal stack may be another object
        return plan

    def mixed(self, layer: nn.Module) -> Any:
        """What serves rows of different adapters, found once until adapters change."""
        from ..kernels.mixed import kernel_of

        found = self.router.kept[layer] = kernel_of(self, layer)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "planned": NO_PLAN, "plans": {}}

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward, on the layer itself or on a stand-in for it."""
        if "__getattr__" in vars(type(module)):
            module = shallow_copy(module)  # the layer's own tensors, and not what its adapters make of them
        if self.instance_forward is not None:
            return self.instance_forward(module, *args, **kwargs)
        return self.base.forward(module, *args, **kwargs)

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and len(args) == 1 and not is_compiling():
            router, local = self.router, self.router.local
            if local.rows is None:
                live = router.stack if local.chosen is None else local.chosen
                plan = self.planned
                if plan.live is not live or plan.version is not router.version:
                    plan = self.plan(layer, live)
                whole = plan.whole
                if whole is not None and modes.enabled():
                    token = None if local.decoding is None else local.decoding.get(whole)
                    y = None if token is None else token(args[0])
                    if y is None:
                        y = whole(layer, args[0])
                    if y is not None:
                        return y
            elif self.main is not None and modes.enabled():
                mixed = router.kept.get(layer, self)
                if mixed is self:
                    mixed = self.mixed(layer)
                if mixed is not None:
                    y = mixed(layer, local.rows, args[0])
                    if y is not None:
                        return y
        if self.carries is not None and CARRIED in kwargs:
            args, kwargs = self.unpacked(args, dict(kwargs))
        rows = self.router.rows()
        live = self.router.live()
        if layer.training and "_hf_hook" in layer.__dict__:
            offload.refuse_training(layer)
        for site in self.tapped:
            if any(name in site.entries for name in (adapter_names(live) if rows is None else rows)):
                site.tap.value = args[0] if args else next(iter(kwargs.values()))
        if self.opaque is not None:
            if rows is not None and any(name in self.opaque.entries for name in rows):
                return self.by_rows(layer, rows, args, kwargs)
            for name in reversed(tuple(adapter_names(live + self.router.merged if self.router.enabled else live))):
                if name in self.opaque.entries:
                    return layer._modules[copy_name(name)](*args, **kwargs)  # type: ignore[misc]
        if self.objective is not None and (live or rows):
            return state_objective(self, layer, live, args, kwargs)
        if self.door is not None:
            return self.door.run(self, layer, args, kwargs)
        if rows is not None:
            return self.by_rows(layer, rows, args, kwargs)
        if not live:
            return self.call(layer, *args, **kwargs)
        if self.module is not None:
            links = self.module.links(live)
            if links:
                return self.module.kind.forward(self.module, self, layer, links, args, kwargs)
        return self.inner(layer, live, args, kwargs)

    def read(self, layer: nn.Module, name: str) -> Tensor | None:
        """A tensor of the layer as its active adapters make it, or None where it is the layer's own."""
        if self.router.rows() is not None:
            return None
        live = self.router.live()
        if self.opaque is not None:
            for adapter in reversed(tuple(adapter_names(live + self.router.merged if self.router.enabled else live))):
                if adapter in self.opaque.entries:
                    found: Tensor = getattr(layer._modules[copy_name(adapter)], name)
                    return found
        site = self.main
        links = site.links(live) if site is not None and name == site.param else []
        if site is None or not links:
            return None
        weight, _ = site.kind.compose(site, links, site.current_weight(), site.current_bias())
        return site.kind.restored(site, weight)

    def unpacked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block with the prefix in place of the cache that checkpointing took away."""
        assert self.carries is not None
        name, place = self.carries
        cache = kwargs.pop(CARRIED)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: cache}

    def by_rows(self, layer: nn.Module, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Each row of a batch through its own adapter, one adapter after another."""
        module = self.module
        if module is None or not any(name in module.entries for name in rows.distinct):
            return self.weights_by_rows(layer, rows, args, kwargs)
        copied = () if self.opaque is None else self.opaque.entries  # where there is a copy, it is all there is
        names = [n for n in rows.distinct if n in module.entries and n not in copied]
        kind: Any = module.kind
        outputs = self.weights_by_rows(layer, rows, args, kwargs)
        parts = [(module.links((name,)), [i for i, n in enumerate(rows) if n == name]) for name in names]
        return kind.by_rows(module, self, outputs, parts, len(rows), args, kwargs)

    def weights_by_rows(self, layer: nn.Module, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer with the adapters of its weights, and full copies of it, row by row."""
        mine = [s for s in (self.main, self.opaque, *self.bare) if s is not None]
        if not any(name in site.entries for site in mine for name in rows.distinct):
            return self.call(layer, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if self.bare or not isinstance(x, Tensor) or x.shape[0] % len(rows):
            raise ValueError(
                f"{mine[0].name}: adapter_names cannot be told apart by row here, because {type(layer).__name__} does not "
                "get the rows of the batch one by one; run the rows of one adapter at a time"
            )
        order, parts = [], []
        for name in dict.fromkeys(rows):
            own = rows_of_adapter([i for i, n in enumerate(rows) if n == name], len(rows), x)
            taken = tuple(select_rows(a, own, x) for a in args)
            named = {k: select_rows(a, own, x) for k, a in kwargs.items()}
            if self.opaque is not None and name in self.opaque.entries:
                part = layer._modules[copy_name(name)](*taken, **named)  # type: ignore[misc]
            else:
                part = self.inner(layer, (name,), taken, named)
            if not isinstance(part, Tensor):
                raise ValueError(
                    f"{mine[0].name}: adapter_names needs layers that return one tensor, and {type(layer).__name__} returns "
                    f"a {type(part).__name__}; run the rows of one adapter at a time"
                )
            parts.append(part)
            order.append(own)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())

    def inner(
        self, layer: nn.Module, live: tuple[AdapterExpr, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer with the adapters of its weights."""
        if self.gated is not None and len(args) == 1 and not kwargs and modes.enabled() and not is_compiling():
            kernel = self.plan(layer, live).kernel
            y = None if kernel is None else kernel(layer, args[0])
            if y is not None:
                return y
        target = layer
        for site in self.bare:
            links = site.links(live)
            if links:
                target = with_effective_weight(target, layer, site, links)
        if self.main is not None:
            links = self.main.links(live)
            if links:
                return self.main.kind.forward(self.main, self, target, links, args, kwargs)
        return self.call(target, *args, **kwargs)
