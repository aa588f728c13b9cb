"""The state of an adapted layer: its base forward and the chain of interceptors that a call goes through.

The layer stays where it is. Its `__class__` becomes a generated subclass (`class_swap`) whose `forward` calls `run` here,
so base `state_dict` keys, `isinstance`, `.weight`, tied weights and every other attribute stay true. Adapter tensors are
registered directly on the layer, because hooks that load, gather or offload parameters (accelerate, ZeRO-3) act on a
layer's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..algebra import modes
from ..distributed import offload
from ..layers.shallow_copy import shallow_copy
from .entries import AdaptedSite
from .interceptors import Args, Call, Interceptor, Kwargs, LayerWeights, ModuleCopies, SplitRows
from .router import AdapterExpr, Router, Rows, adapter_names

I = TypeVar("I", bound=Interceptor)  # noqa: E741  (an interceptor's class)
Kernel = Callable[[nn.Module, Tensor], "Tensor | None"]  # the output of a layer, or None if it declines
RowKernel = Callable[[nn.Module, Rows, Tensor], "Tensor | None"]


class Planner(Protocol):
    """Chooses the kernels of adapted layers; `kernels.plan` has the one that attaching installs on the router."""

    def choose_kernel(
        self, state: AdaptedState, layer: nn.Module, live: tuple[AdapterExpr, ...], version: object
    ) -> Kernel | None: ...

    def choose_row_kernel(self, state: AdaptedState, layer: nn.Module) -> RowKernel | None: ...


class Plan(NamedTuple):
    """How a layer runs with one stack of adapters.

    Attributes:
        live: the stack.
        version: of the router, when it was made.
        kernel: what runs the layer's weights with their adapters, or None.
        fast_path: the kernel, if nothing else happens at the layer.
        chain: the interceptors that act.
    """

    live: tuple[AdapterExpr, ...] | None
    version: object
    kernel: Kernel | None
    fast_path: Kernel | None
    chain: tuple[Interceptor, ...]


NO_PLAN = Plan(None, None, None, None, ())
PLANS = 16  # cached at a layer


class AdaptedState:
    """The state of one adapted layer.

    Attributes:
        base: the layer's own class.
        router: which adapters of the model act.
        interceptors: what its adapters do here, in order.
        weights: the interceptor of its weights, or None.
        instance_forward: a forward that others put on the instance before it was adapted, or None.
        split: how transformers' tensor parallelism splits the layer, and the mesh, or None.
        group: the layers that see the same input, as the planner found them, or None.
    """

    def __init__(self, layer: nn.Module, router: Router) -> None:
        self.base: type[nn.Module] = type(layer)
        self.router = router
        self.interceptors: tuple[Interceptor, ...] = ()
        self.weights: LayerWeights | None = None
        self.instance_forward: Callable[..., Any] | None = None
        self.split: tuple[Any, Any] | None = None
        self.group: Any = None
        self.planned = NO_PLAN
        self.plans: dict[tuple[AdapterExpr, ...], Plan] = {}

    # The chain.

    def find(self, kind: type[I]) -> I | None:
        """The layer's interceptor of a class, or None."""
        return next((i for i in self.interceptors if isinstance(i, kind)), None)

    def insert(self, interceptor: Interceptor) -> None:
        """Add an interceptor at the place of its order, instead of one of its class."""
        others = [i for i in self.interceptors if type(i) is not type(interceptor)]
        self._hold([*others, interceptor])

    def intercept(self, kind: type[I], site: AdaptedSite) -> None:
        """Let the interceptor of a class, made if there is none, serve a site."""
        found = self.find(kind) or kind()
        found.add(site)
        self.insert(found)

    def remove(self, kind: type[Interceptor]) -> None:
        """Remove the interceptor of a class, if there is one."""
        self._hold([i for i in self.interceptors if not isinstance(i, kind)])

    def release(self, site: AdaptedSite) -> None:
        """Let no interceptor serve a site any longer."""
        self._hold([i for i in self.interceptors if not i.drop(site)])

    def _hold(self, interceptors: list[Interceptor]) -> None:
        self.interceptors = tuple(sorted(interceptors, key=lambda i: i.order))
        self.weights = self.find(LayerWeights)
        self.planned, self.plans = NO_PLAN, {}

    @property
    def main(self) -> AdaptedSite | None:
        """The site of the weight on whose input and output operators act, or None."""
        return None if self.weights is None else self.weights.main

    @property
    def in_use(self) -> bool:
        return bool(self.interceptors)

    @property
    def only_kernel(self) -> bool:
        """Whether a kernel of the layer's weights, or of its layers' weights, does all that happens here."""
        return all(i.by_kernel for i in self.interceptors)

    def describe_adapters(self) -> str:
        """The layer's adapters with their methods, for `print(model)`."""
        entries = {n: e for i in self.interceptors for s in i.sites for n, e in s.entries.items()}
        return ", ".join(f"{name} ({entry.method.peft_name})" for name, entry in entries.items())

    # Plans.

    def plan(self, layer: nn.Module, live: tuple[AdapterExpr, ...]) -> Plan:
        """How the layer runs with a stack of adapters, computed once until adapters change."""
        plan = self.planned
        if plan.live is not live or plan.version is not self.router.version:
            version = self.router.version
            known = self.plans.get(live)
            if known is None or known.version is not version:
                planner = self.router.planner
                kernel = None if planner is None else planner.choose_kernel(self, layer, live, version)
                known = Plan(live, version, kernel, kernel if self.only_kernel else None, self._chain_of(live))
                # A few stacks, as when one is switched on and off; another thread may do the same at once.
                kept = {k: p for k, p in self.plans.items() if p.version is version}
                self.plans = {**(kept if len(kept) < PLANS else {}), live: known}
            self.planned = plan = known._replace(live=live)  # an equal stack may be another object
        return plan

    def _chain_of(self, live: tuple[AdapterExpr, ...]) -> tuple[Interceptor, ...]:
        names = tuple(adapter_names(live))
        return tuple(i for i in self.interceptors if i.acts(names))

    def _chain_of_rows(self, rows: Rows) -> tuple[Interceptor, ...]:
        chain = tuple(i for i in self.interceptors if i.by_row and i.acts(rows.distinct))
        split = SplitRows(self.find(ModuleCopies), self.weights)
        return (*chain, split) if split.acts(rows.distinct) else chain

    def _row_kernel(self, layer: nn.Module) -> RowKernel | None:
        """The kernel for rows of different adapters, chosen once until adapters change."""
        planner = self.router.planner
        found = None if planner is None else planner.choose_row_kernel(self, layer)
        self.router.kept[layer] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "planned": NO_PLAN, "plans": {}}

    # Calls.

    def call(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The base layer's own forward, on the layer itself or on a shallow copy of it."""
        if "__getattr__" in vars(type(module)):
            module = shallow_copy(module)  # with the layer's own tensors instead of the adapted ones
        if self.instance_forward is not None:
            return self.instance_forward(module, *args, **kwargs)
        return self.base.forward(module, *args, **kwargs)

    def run(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """The layer's forward with the adapters that act in this call."""
        router, local = self.router, self.router.local
        # First what nearly every call is: one positional argument, at a layer that a kernel serves alone.
        if not kwargs and len(args) == 1 and not is_compiling():
            if local.rows is None:
                live = router.stack if local.chosen is None else local.chosen
                plan = self.planned
                if plan.live is not live or plan.version is not router.version:
                    plan = self.plan(layer, live)
                fast = plan.fast_path
                if fast is not None and modes.kernels_enabled():
                    token = None if local.decoding is None else local.decoding.get(fast)
                    y = None if token is None else token(args[0])
                    if y is None:
                        y = fast(layer, args[0])
                    if y is not None:
                        return y
            elif self.weights is not None and modes.kernels_enabled():
                by_rows = router.kept.get(layer, self)
                if by_rows is self:
                    by_rows = self._row_kernel(layer)
                if by_rows is not None:
                    y = by_rows(layer, local.rows, args[0])
                    if y is not None:
                        return y
        if layer.training and "_hf_hook" in layer.__dict__:
            offload.refuse_training(layer)
        rows, live, fused = router.rows(), router.live(), None
        if rows is not None:
            chain = self._chain_of_rows(rows)
        elif is_compiling():
            chain = self._chain_of(live)  # nothing is cached while tracing
        else:
            plan = self.plan(layer, live)
            chain = plan.chain
            if plan.kernel is not None and modes.kernels_enabled():
                fused = partial(plan.kernel, layer)
        return self._proceed(chain, 0, Call(layer, self.base, router, live, self.call, fused), args, kwargs)

    def _proceed(self, chain: tuple[Interceptor, ...], at: int, call: Call, args: Args, kwargs: Kwargs) -> Any:
        if at == len(chain):
            return self.call(call.layer, *args, **kwargs)
        return chain[at].run(call, args, kwargs, partial(self._proceed, chain, at + 1, call))

    def read(self, layer: nn.Module, name: str) -> Tensor | None:
        """A tensor of the layer as its active adapters make it, or None if it is the layer's own."""
        if self.router.rows() is not None:
            return None
        live = self.router.live()
        copies = self.find(ModuleCopies)
        copied = None if copies is None else copies.active(self.router, live, layer)
        if copied is not None:
            found: Tensor = getattr(copied, name)
            return found
        site = self.main
        terms = site.terms(live) if site is not None and name == site.param else []
        if site is None or not terms:
            return None
        weight, _ = site.kind.compose(site, terms, site.current_weight(), site.current_bias())
        return site.kind.restored(site, weight)


def state_of(layer: nn.Module) -> AdaptedState | None:
    """The state of an adapted layer, or None."""
    found = layer.__dict__.get("_veneer")
    return found if isinstance(found, AdaptedState) else None
