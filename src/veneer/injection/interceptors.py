"""Interceptors: what happens at an adapted layer, each kind in one class, in the order of their `order`.

A layer holds the interceptors that its adapters need. One call goes through those that act for the adapters of this
call, from the first to the last; each runs the rest by `proceed`, and after the last comes the base layer's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..layers.shallow_copy import rows_of_adapter, select_rows
from .effective_weight import with_effective_weight
from .entries import AdaptedSite, copy_name
from .router import AdapterExpr, Scope, adapter_names

if TYPE_CHECKING:
    from .router import Router, Rows

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Proceed = Callable[[Args, Kwargs], Any]
CARRIED = "veneer_prefix"  # argument that brings a block the cache that gradient checkpointing takes away


class Call:
    """One call of an adapted layer.

    Attributes:
        layer: the layer.
        base: its own class.
        router: of the model.
        live: the stack of adapters that acts.
        forward: the base layer's own forward, on the layer or on a shallow copy of it.
        fused: a kernel of the layer's weights for `live`, or None.
    """

    __slots__ = ("base", "forward", "fused", "layer", "live", "router")

    def __init__(
        self,
        layer: nn.Module,
        base: type[nn.Module],
        router: Router,
        live: tuple[AdapterExpr, ...],
        forward: Callable[..., Any],
        fused: Callable[[Tensor], Tensor | None] | None,
    ) -> None:
        self.layer, self.base, self.router, self.live = layer, base, router, live
        self.forward, self.fused = forward, fused


class Interceptor:
    """One kind of thing that adapters do at a layer."""

    order: ClassVar[int]
    by_kernel: bool = False  # a fused kernel of the layer's weights does all of it
    by_row: ClassVar[bool] = True  # it acts in a call with rows of different adapters; else `SplitRows` stands in

    @property
    def sites(self) -> list[AdaptedSite]:
        """The sites whose adapters it runs."""
        return []

    def acts(self, names: Collection[str]) -> bool:
        """Whether it does anything in a call with these adapters."""
        return True

    def add(self, site: AdaptedSite) -> None:
        """Serve a site."""
        raise NotImplementedError

    def drop(self, site: AdaptedSite) -> bool:
        """Serve a site no longer; returns whether nothing is left to serve."""
        return False

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        """The layer's output, by `proceed(args, kwargs)` or without it."""
        raise NotImplementedError


class CarriedPrefix(Interceptor):
    """Puts a prefix back in place of the cache that gradient checkpointing takes from a block.

    Args:
        name: the block's cache argument.
        place: its position among the positional arguments.
    """

    order = 0

    def __init__(self, name: str, place: int) -> None:
        self.name, self.place = name, place

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        if CARRIED not in kwargs:
            return proceed(args, kwargs)
        kwargs = dict(kwargs)
        cache = kwargs.pop(CARRIED)
        if self.place < len(args):
            return proceed((*args[: self.place], cache, *args[self.place + 1 :]), kwargs)
        return proceed(args, {**kwargs, self.name: cache})


class OneSite(Interceptor):
    """An interceptor that serves one site."""

    def __init__(self) -> None:
        self.site: AdaptedSite | None = None

    @property
    def sites(self) -> list[AdaptedSite]:
        return [] if self.site is None else [self.site]

    def acts(self, names: Collection[str]) -> bool:
        return self.site is not None and any(name in self.site.entries for name in names)

    def add(self, site: AdaptedSite) -> None:
        self.site = site

    def drop(self, site: AdaptedSite) -> bool:
        return self.site is site


class ResidualTaps(Interceptor):
    """Keeps the input of this module for the sites that map a sub-layer's output and need the residual stream."""

    order = 10

    def __init__(self) -> None:
        self.tapped: list[AdaptedSite] = []

    def acts(self, names: Collection[str]) -> bool:
        return any(name in site.entries for site in self.tapped for name in names)

    def add(self, site: AdaptedSite) -> None:
        if site not in self.tapped:
            self.tapped.append(site)

    def drop(self, site: AdaptedSite) -> bool:
        self.tapped = [s for s in self.tapped if s is not site]
        return not self.tapped

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        names = call.router.rows() or tuple(adapter_names(call.live))
        for site in self.tapped:
            if any(name in site.entries for name in names):
                site.tap.value = args[0] if args else next(iter(kwargs.values()))
        return proceed(args, kwargs)


class ModuleCopies(OneSite):
    """Runs the trained copy of a module (`modules_to_save`) instead of the module, of the last adapter that has one."""

    order = 20
    by_row = False

    def acts(self, names: Collection[str]) -> bool:
        return True  # a merged adapter's copy acts as well, and is not among the names

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        found = self.active(call.router, call.live, call.layer)
        return proceed(args, kwargs) if found is None else found(*args, **kwargs)

    def active(self, router: Router, live: tuple[AdapterExpr, ...], layer: nn.Module) -> nn.Module | None:
        """The copy that stands for the layer now, or None."""
        assert self.site is not None
        acting = live + router.merged if router.enabled else live
        for name in reversed(tuple(adapter_names(acting))):
            if name in self.site.entries:
                return layer._modules[copy_name(name)]
        return None


class ModuleOutputs(OneSite):
    """Maps the first output of a whole module."""

    order = 50

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        assert self.site is not None
        site, rows = self.site, call.router.rows()
        outputs = proceed(args, kwargs)
        kind: Any = site.kind
        if rows is None:
            return kind.map_outputs(site, call.base, outputs, site.terms(call.live), args, kwargs)
        # A copy of the module is all there is for its adapter's rows.
        names = [n for n in rows.distinct if n in site.entries and copy_name(n) not in call.layer._modules]
        parts = [(site.terms((name,)), [i for i, n in enumerate(rows) if n == name]) for name in names]
        return kind.by_rows(site, call.base, outputs, parts, len(rows), args, kwargs)


class FusedNetwork(Interceptor):
    """Runs a gated feed-forward network, whose layers have adapters, as one kernel.

    Args:
        parts: names of its layers, as `kernels.structure` found them.
    """

    order = 60
    by_kernel = True
    by_row = False

    def __init__(self, parts: object) -> None:
        self.parts = parts

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        if call.fused is not None and len(args) == 1 and not kwargs:
            y = call.fused(args[0])
            if y is not None:
                return y
        return proceed(args, kwargs)


class SiblingScope(Interceptor):
    """Marks what runs as called by this module's forward, which calls several adapted layers on one input.

    Their kernels share work only in such a call: from elsewhere nothing tells that the others will be called next.
    """

    order = 65
    by_kernel = True
    by_row = False

    def acts(self, names: Collection[str]) -> bool:
        return bool(names)

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        if is_compiling():  # kernels decline
            return proceed(args, kwargs)
        local = call.router.local
        before, scope = local.scope, Scope(call.layer)
        local.scope = scope
        try:
            return proceed(args, kwargs)
        finally:
            local.scope = before
            scope.close()


class LayerWeights(Interceptor):
    """Runs a layer with the adapters of its weight, and of parameters that it uses on its own terms.

    Attributes:
        main: the weight on whose input and output operators act, or None.
        bare: parameters that are replaced by their effective value during the call.
    """

    order = 70
    by_row = False

    def __init__(self) -> None:
        self.main: AdaptedSite | None = None
        self.bare: list[AdaptedSite] = []

    @property
    def by_kernel(self) -> bool:  # type: ignore[override]
        return not self.bare

    @property
    def sites(self) -> list[AdaptedSite]:
        return self.bare if self.main is None else [self.main, *self.bare]

    def acts(self, names: Collection[str]) -> bool:
        return any(name in site.entries for site in self.sites for name in names)

    def add(self, site: AdaptedSite) -> None:
        if not site.bare:
            self.main = site
        elif site not in self.bare:
            self.bare.append(site)

    def drop(self, site: AdaptedSite) -> bool:
        self.main = None if self.main is site else self.main
        self.bare = [s for s in self.bare if s is not site]
        return not self.sites

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        return self.run_adapters(call, call.live, args, kwargs)

    def run_adapters(self, call: Call, live: tuple[AdapterExpr, ...], args: Args, kwargs: Kwargs) -> Any:
        """The layer with the adapters of `live`."""
        target = call.layer
        for site in self.bare:
            terms = site.terms(live)
            if terms:
                target = with_effective_weight(target, call.layer, site, terms)
        terms = [] if self.main is None else self.main.terms(live)
        if self.main is not None and terms:
            return self.main.kind.forward(self.main, call.forward, target, terms, args, kwargs)
        return call.forward(target, *args, **kwargs)


class SplitRows(Interceptor):
    """Runs each row of a batch through its own adapter's weights or copy, one adapter after another.

    Args:
        copies: of the layer, or None.
        weights: of the layer, or None.
    """

    order = 80

    def __init__(self, copies: ModuleCopies | None, weights: LayerWeights | None) -> None:
        self.copied: Mapping[str, object] = {} if copies is None or copies.site is None else copies.site.entries
        self.weights = weights
        self.served = [s for i in (weights, copies) if i is not None for s in i.sites]

    def acts(self, names: Collection[str]) -> bool:
        return any(name in site.entries for site in self.served for name in names)

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        rows: Rows | None = call.router.rows()
        assert rows is not None
        x = args[0] if args else next(iter(kwargs.values()))
        bare = self.weights is not None and bool(self.weights.bare)
        if bare or not isinstance(x, Tensor) or x.shape[0] % len(rows):
            raise ValueError(
                f"{self.served[0].name}: adapter_names cannot be told apart by row here, because {call.base.__name__} does "
                "not get the rows of the batch one by one; run the rows of one adapter at a time"
            )
        order, parts = [], []
        for name in dict.fromkeys(rows):
            own = rows_of_adapter([i for i, n in enumerate(rows) if n == name], len(rows), x)  # (rows of this adapter,)
            taken = tuple(select_rows(a, own, x) for a in args)
            named = {k: select_rows(a, own, x) for k, a in kwargs.items()}
            copied = call.layer._modules[copy_name(name)] if name in self.copied else None
            if copied is not None:
                part = copied(*taken, **named)
            elif self.weights is not None:
                part = self.weights.run_adapters(call, (name,), taken, named)
            else:
                part = call.forward(call.layer, *taken, **named)
            if not isinstance(part, Tensor):
                raise ValueError(
                    f"{self.served[0].name}: adapter_names needs layers that return one tensor, and {call.base.__name__} "
                    f"returns a {type(part).__name__}; run the rows of one adapter at a time"
                )
            parts.append(part)
            order.append(own)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())
