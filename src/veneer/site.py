"""Sites: the places of a base model that are adapted, and how a layer's forward is taken over.

The layer stays where it is. Its `__class__` becomes a generated subclass whose `forward` runs the recursion
of the adapters, so base `state_dict` keys, `isinstance`, `.weight`, tied weights and every other attribute
stay true. Adapter tensors are registered directly on the layer, because hooks that load, gather or offload
parameters (accelerate, ZeRO-3) act on a layer's own parameters.
"""

from __future__ import annotations

import inspect
import itertools
import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import kernels
from .backends import held
from .inits import START
from .interop import offload, tensor_parallel
from .interop.sharding import is_distributed, whole
from .kept import Kept
from .operators import Operator
from .router import Combined, Item, flat

if TYPE_CHECKING:
    from .door import Door
    from .kernels.plan import Group, Kernel
    from .kernels.structure import Gated
    from .layers.kind import LayerKind
    from .method import Method
    from .places import Spot
    from .router import Router, Rows


CARRIED = "veneer_prefix"  # argument that brings a block the cache that gradient checkpointing takes away


@dataclass(frozen=True, slots=True)
class Geometry:
    """A weight seen as a matrix (fan_out, fan_in).

    Attributes:
        fan_in: input features or channels; vocabulary for a lookup.
        fan_out: output features or channels; width for a lookup.
        kernel: spatial size of a convolution, else ().
        groups: groups of a convolution, else 1.
        experts: stacked experts of a 3-D parameter, else 0.
        lookup: the input is a tensor of ids (embeddings).
        bias: the layer adds a bias (fan_out,).
        bare: the weight is a parameter that its module uses on its own terms.
    """

    fan_in: int
    fan_out: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 0
    lookup: bool = False
    bias: bool = False
    bare: bool = False


class Link:
    """What one adapter says at one site in one forward: a term of the recursion."""

    __slots__ = ("delta", "left", "post", "right", "shift")

    def __init__(
        self,
        delta: Operator | None,
        left: Operator | None,
        right: Operator | None,
        shift: Tensor | None,
        post: Callable[[Any, Tensor], Tensor] | None,
    ) -> None:
        self.delta, self.left, self.right, self.shift, self.post = delta, left, right, shift, post


class Fork:
    """Branches of the recursion that start from the same output; their weighted changes to it are added."""

    __slots__ = ("branches",)

    def __init__(self, branches: list[tuple[float, list[Link | Fork]]]) -> None:
        self.branches = branches


def every(links: Sequence[Link | Fork]) -> Iterator[Link]:
    """The links in a chain, those of its branches too."""
    for link in links:
        if isinstance(link, Link):
            yield link
        else:
            for _, branch in link.branches:
                yield from every(branch)


class Tap(threading.local):
    """What went into another module in this call, kept for the site that asked for it; one a thread."""

    value: Tensor | None = None

    def __reduce__(self) -> Any:
        return Tap, ()


class Entry:
    """One adapter's share of one site: its method there and where its tensors are."""

    __slots__ = ("frozen", "key", "method", "names", "original", "saved", "serial", "shared", "trained")
    made = itertools.count()

    def __init__(self, method: Method, key: str, names: Mapping[str, str]) -> None:
        self.method, self.key, self.names = method, key, names
        self.original = method  # `method` may be given another scale at this site
        self.trained: tuple[tuple[str, str], ...] = ()  # the method's key -> attribute of the owner
        self.frozen: tuple[tuple[str, str], ...] = ()
        self.shared: tuple[str, ...] = ()
        self.serial = next(Entry.made)  # tells it from an adapter of the same name that was deleted
        self.saved = True  # False where the tensors are another site's


@dataclass(slots=True)
class Original:
    """A base weight, and its bias, from before a merge, with what brings their exact bits back."""

    weight: Tensor | None  # None where it is packed: the token holds it
    bias: Tensor | None
    token: object
    bias_token: object = None
    parameter: nn.Parameter | None = None  # the tied Parameter that merging replaced by one of its own
    groups: int = 1


class Site:
    """One adapted place: a layer's weight or a bare parameter.

    Methods read its geometry and make their tensors with its factories; nothing here knows a method.

    Attributes:
        name: dotted name of the module (or `module.parameter`) in the base model.
        key: the same place in peft's files, below `base_model.model.`.
        owner: the module that holds the weight and the adapter's tensors.
        param: name of the weight on `owner`.
    """

    def __init__(
        self, name: str, key: str, owner: nn.Module, param: str, kind: LayerKind, backend: Any, router: Router
    ) -> None:
        self.name, self.key, self.owner, self.param = name, key, owner, param
        self.kind, self.backend, self.router = kind, backend, router
        self.geometry = geometry = kind.measure(owner, param)
        # Under the names that methods use.
        self.fan_in, self.fan_out, self.kernel = geometry.fan_in, geometry.fan_out, geometry.kernel
        self.groups, self.experts = geometry.groups, geometry.experts
        self.lookup, self.bare = geometry.lookup, geometry.bare
        self.role = ""  # of a stack: "model", "encoder" or "decoder"
        self.near = owner  # the module whose dtype and device are meant where the owner has no tensors
        self.entries: dict[str, Entry] = {}
        self.spot: Spot | None = None  # the place in its block, where the site is a place in a block
        self.tap = Tap()  # the residual stream there
        self.norm: nn.Module | None = None  # the norm behind the residual's sum there
        self.original: Original | None = None  # while adapters are merged
        self.squares = Kept()  # of the weight's rows
        self.device: torch.device | None = None
        self.dtype = torch.float32

    @property
    def low_rank_factor(self) -> float:
        return self.kind.low_rank_factor

    @property
    def patch(self) -> int:
        """Columns of the weight as a matrix: fan_in times the kernel's size."""
        return self.fan_in * math.prod(self.kernel)

    @property
    def bias(self) -> Tensor | None:
        """The frozen base bias (fan_out,) without any merged adapter, or None."""
        if not self.geometry.bias:
            return None
        return self.current_bias() if self.original is None else self.original.bias

    def weight(self) -> Tensor:
        """The frozen base weight as a matrix (fan_out, patch), (experts, out, in) for experts.

        It is the weight without any merged adapter, in its stored dtype, and never copied for plain weights.
        """
        return self.kind.canonical(self, self.stored())

    def stored(self) -> Tensor:
        """The frozen base weight as the layer stores it, without any merged adapter."""
        original, stored = self.original, None
        if original is not None:
            stored = original.weight
            if stored is None and original.token is not None:
                stored = self.backend.before(self.owner, self.param, original.token)
        found: Tensor = self.backend.read(self.owner, self.param) if stored is None else stored
        return found

    def stored_rows(self, index: Tensor) -> Tensor:
        """Some rows of `stored()`, (k, ...), whole in every process also where it is split."""
        weight = self.stored()
        return whole(weight.index_select(0, index.to(weight.device)))

    def matrix(self, stored: Tensor) -> Tensor:
        """A tensor in the layer's own layout as a matrix, as `weight()` is of `stored()`."""
        return self.kind.canonical(self, stored)

    def rows(self) -> Tensor:
        """`weight()`, of a grouped convolution without the zeros off its groups: (fan_out, patch / groups)."""
        return self.stored().flatten(1) if self.groups > 1 else self.weight()

    def row_squares(self) -> Tensor:
        """Squared length of each row of `weight()`, (fan_out,), in float64 where the device has it.

        Computed when the weight changes, not on every call.
        """
        packed = self.backend.packed
        source = None if self.original is None else self.original.weight
        if self.original is None and (packed or self.param in self.owner._parameters):
            source = self.backend.storage(self.owner, self.param)
        if source is None or (source.device.type == "meta" and not packed):
            source = self.stored()  # offloaded, or packed and merged

        def squares() -> Tensor:
            rows = self.rows().detach()
            wide = torch.float64 if rows.device.type in ("cpu", "cuda", "meta") else torch.float32
            norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)  # no wide copy of the weight is made
            return norm.square()

        return self.squares.get(source, squares)

    def current_weight(self) -> Tensor:
        """The layer's weight as a matrix, with whatever is merged into it."""
        return self.kind.canonical(self, self.backend.read(self.owner, self.param))

    def current_bias(self) -> Tensor | None:
        """The layer's bias, with whatever is merged into it."""
        if not self.geometry.bias:
            return None
        name, bias = self.kind.bias, held(self.owner, self.kind.bias)
        if bias is not None and bias.device.type == "meta":
            fetched = offload.fetch(self.owner, name)
            return bias if fetched is None else fetched
        return bias

    @property
    def reference(self) -> Tensor:
        """The tensor whose device the adapter's follow, and dtype: the weight, or a module's first one that has any."""
        if self.backend is not None:
            weight: Tensor = self.backend.storage(self.owner, self.param)
            return weight
        found = next((p for p in own_parameters(self.near) if p.is_floating_point()), None)
        return next(own_parameters(self.near), torch.empty(0)) if found is None else found

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""
        if self.backend is not None:
            dtype: torch.dtype = self.backend.dtype(self.owner, self.param)
            return dtype
        dtype = self.reference.dtype
        return dtype if dtype.is_floating_point else torch.float32

    @property
    def home(self) -> torch.device:
        """Where the adapter's tensors live: the weight's device, or where an offloaded layer computes."""
        device = offload.execution_device(self.owner)
        if device is None and self.near is not self.owner:
            found = (offload.execution_device(m) for m in self.near.modules())
            device = next((d for d in found if d is not None), None)
        return self.reference.device if device is None else device

    def split(self, values: Mapping[str, Tensor], entry: Entry) -> dict[str, Tensor]:
        """An adapter's whole tensors by attribute, each split as tensor parallelism splits the layer's weight."""
        if self.backend is None or not is_distributed(self.reference):
            return dict(values)
        weight, axes = self.current_weight().detach(), entry.method.axes(self)
        keys = {attr: key for key, attr in (*entry.trained, *entry.frozen)}
        keep = {"in"} if self.lookup else set()  # ids are looked up in every process
        return {a: tensor_parallel.distribute(t, weight, axes.get(keys[a], ()), keep) for a, t in values.items()}

    # Factories of fresh tensors. On the meta device, used when a file brings the values, they cost nothing.

    @property
    def meta(self) -> bool:
        return self.device is not None and self.device.type == "meta"

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=self.dtype)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        t = self.empty(*shape)
        return t if self.meta else t.normal_(0.0, std)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        t = self.empty(*shape)
        return t if self.meta else t.uniform_(-bound, bound)

    def kaiming_uniform(self, *shape: int, a: float = math.sqrt(5)) -> Tensor:
        t = self.empty(*shape)
        return t if self.meta else nn.init.kaiming_uniform_(t, a=a)

    def computed(self, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
        """`make()` cast to the adapter's dtype, or only its shape where a file brings the values."""
        if self.meta:
            return self.empty(*shape)
        made = whole(make().detach()).reshape(shape)
        return made.to(device=self.device, dtype=self.dtype, copy=True).contiguous()  # never the base's storage

    def start(self, how: str, r: int, scale: float, **options: Any) -> tuple[Tensor, Tensor]:
        """Starting factors (B, A) computed from the base weight, scale * B A being their share of it."""
        weight = whole(self.weight().detach())
        device = self.home
        if weight.device.type == "meta":  # a skeleton: shapes are all there is
            return self.empty(weight.shape[0], r), self.empty(r, weight.shape[1])
        with torch.no_grad():
            B, A = START[how](weight.float(), r, scale, **options)
        return B.to(device=device, dtype=self.dtype).contiguous(), A.to(device=device, dtype=self.dtype).contiguous()

    # What the runtime asks.

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's tensors here, trained, frozen and shared, under the method's own keys."""
        entry = self.entries[adapter]
        params, buffers = self.owner._parameters, self.owner._buffers
        p: dict[str, Any] = {key: params[attr] for key, attr in entry.trained}
        for key, attr in entry.frozen:
            p[key] = buffers[attr]
        for key in entry.shared:
            p[key] = self.router.shared.get(adapter, key)
        return p

    def links(self, items: tuple[Item, ...]) -> list[Link | Fork]:
        """The terms of the recursion for the adapters of `items` that are here, in order."""
        found: list[Link | Fork] = []
        for item in items:
            if isinstance(item, Combined):
                pairs = [(w, self.links(b)) for w, b in zip(item.weights, item.branches, strict=True)]
                if branches := [(w, b) for w, b in pairs if b]:
                    found.append(Fork(branches))
                continue
            entry = self.entries.get(item)
            if entry is not None:
                found.append(link(entry.method, self.tensors(item), self))
        return found

    def adapter(self, name: str) -> tuple[Method, dict[str, Tensor]] | None:
        """The method and the tensors of another adapter here, or None where it has none."""
        entry = self.entries.get(name)
        return None if entry is None else (entry.method, self.tensors(name))

    def __repr__(self) -> str:
        return f"Site({self.name!r}, {type(self.owner).__name__}, ({self.fan_out}, {self.patch}))"


def own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """A module's parameters without its adapters', which another thread may attach meanwhile."""
    for name, parameter in dict(module._parameters).items():
        if parameter is not None and ":" not in name:
            yield parameter
    for name, child in dict(module._modules).items():
        if child is not None and ":" not in name:
            yield from own_parameters(child)


def link(method: Method, p: Mapping[str, Tensor], site: Site) -> Link:
    """Ask a method for its operators; only the hooks it overrides are called."""
    hooks = method.hooks
    return Link(
        method.delta(p, site) if "delta" in hooks else None,
        method.left(p, site) if "left" in hooks else None,
        method.right(p, site) if "right" in hooks else None,
        method.shift(p, site) if "shift" in hooks else None,
        (lambda x, y: method.post(p, site, x, y)) if "post" in hooks else None,
    )


class Adapted:
    """Mixin of the generated classes; also how to recognise an adapted layer."""

    forward: Callable[..., Any]  # of each generated class, with the signature of its base

    _veneer_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._veneer_base, "__getattr__" in vars(type(self))), self.__dict__


def _rebuild(base: type[nn.Module], read: bool = False) -> nn.Module:
    cls = adapted_class(base, read)
    module: nn.Module = cls.__new__(cls)
    return module


_CLASSES: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module], read: bool = False) -> type[nn.Module]:
    """The subclass of `base` that runs adapters, one per base class.

    Args:
        base: the layer's own class.
        read: the layer's tensors are what its active adapters make of them also where others read them, instead of
            calling the layer: losses that are computed from `lm_head.weight`.
    """
    cls = _CLASSES.get((base, read))
    if cls is None:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            state: Takeover = self.__dict__["_veneer"]
            return state.run(self, args, kwargs)

        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]  # others read arguments off it
        body = {
            "_veneer_base": base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "forward": forward,
        }
        if read:

            def look_up(self: nn.Module, name: str) -> Any:
                state = self.__dict__.get("_veneer")
                found = None if state is None or name not in self._parameters else state.read(self, name)
                return base.__getattr__(self, name) if found is None else found

            body["__getattr__"] = look_up  # parameters are found there, as no module has them in its `__dict__`
        cls = type(base.__name__, (base, Adapted), body)  # base first: a class with bases of its own keeps its layout
        cls.__qualname__ = base.__qualname__
        _CLASSES[base, read] = cls
    return cls


class Plan(NamedTuple):
    """What serves a layer with one stack of adapters.

    Attributes:
        live: the stack.
        version: of the router, when it was made.
        kernel: what runs the layer's weights with their adapters, or None.
        whole: the same where nothing else happens at the layer.
    """

    live: tuple[Item, ...] | None
    version: object
    kernel: Kernel | None
    whole: Kernel | None


NO_PLAN = Plan(None, None, None, None)
PLANS = 16  # kept at a layer


class Takeover:
    """The state of one adapted layer: its base forward and the sites whose weights it uses."""

    def __init__(self, layer: nn.Module, router: Router) -> None:
        self.base: type[nn.Module] = type(layer)
        self.router = router
        self.main: Site | None = None  # a layer whose input and output the operators act on
        self.bare: list[Site] = []  # parameters swapped for their effective value during forward
        self.door: Door | None = None  # a stack into which virtual tokens go
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
        self.plans: dict[tuple[Item, ...], Plan] = {}

    @property
    def in_use(self) -> bool:
        held = (self.main, self.module, self.opaque, self.door, self.carries, self.objective, self.gated)
        return bool(self.bare or self.tapped) or any(x is not None for x in held)

    @property
    def only_main(self) -> bool:
        """Whether the operators of its weight, or those of its layers, are all that is done here."""
        held = (self.module, self.opaque, self.door, self.carries, self.objective)
        return not (self.bare or self.tapped) and all(x is None for x in held)

    def plan(self, layer: nn.Module, live: tuple[Item, ...]) -> Plan:
        """What serves a stack of adapters, found once until adapters change."""
        plan = self.planned
        if plan.live is not live or plan.version is not self.router.version:
            from .kernels.plan import kernel_of

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
        from .kernels.mixed import kernel_of

        found = self.router.kept[layer] = kernel_of(self, layer)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "planned": NO_PLAN, "plans": {}}

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward, on the layer itself or on a stand-in for it."""
        if "__getattr__" in vars(type(module)):
            module = stand_in(module)  # the layer's own tensors, and not what its adapters make of them
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
                if whole is not None and kernels.enabled():
                    token = None if local.decoding is None else local.decoding.get(whole)
                    y = None if token is None else token(args[0])
                    if y is None:
                        y = whole(layer, args[0])
                    if y is not None:
                        return y
            elif self.main is not None and kernels.enabled():
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
            if any(name in site.entries for name in (flat(live) if rows is None else rows)):
                site.tap.value = args[0] if args else next(iter(kwargs.values()))
        if self.opaque is not None:
            if rows is not None and any(name in self.opaque.entries for name in rows):
                return self.by_rows(layer, rows, args, kwargs)
            for name in reversed(tuple(flat(live + self.router.merged if self.router.enabled else live))):
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
            for adapter in reversed(tuple(flat(live + self.router.merged if self.router.enabled else live))):
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
            own = own_rows([i for i, n in enumerate(rows) if n == name], len(rows), x)
            taken = tuple(picked(a, own, x) for a in args)
            named = {k: picked(a, own, x) for k, a in kwargs.items()}
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

    def inner(self, layer: nn.Module, live: tuple[Item, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer with the adapters of its weights."""
        if self.gated is not None and len(args) == 1 and not kwargs and kernels.enabled() and not is_compiling():
            kernel = self.plan(layer, live).kernel
            y = None if kernel is None else kernel(layer, args[0])
            if y is not None:
                return y
        target = layer
        for site in self.bare:
            links = site.links(live)
            if links:
                target = with_weights(target, layer, site, links)
        if self.main is not None:
            links = self.main.links(live)
            if links:
                return self.main.kind.forward(self.main, self, target, links, args, kwargs)
        return self.call(target, *args, **kwargs)


def state_objective(
    state: Takeover, model: nn.Module, live: tuple[Item, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A model's forward whose loss an adapter computes, from the logits of virtual and real tokens."""
    assert state.objective is not None
    names = state.router.rows() or tuple(flat(live))
    entry = next((state.objective.entries[n] for n in names if n in state.objective.entries), None)
    if entry is None:
        return state.inner(model, live, args, kwargs)
    method = entry.method
    rows = state.router.rows()
    call = {**dict(zip(inspect.signature(state.base.forward).parameters, (model, *args), strict=False)), **kwargs}
    call.pop("self", None)
    inputs = {name: call.pop(name) for name in method.extra_inputs if name in call}
    labels = call.pop("labels", None)
    if labels is None:
        return state.inner(model, live, (), call)
    as_tuple = call.get("return_dict") is False
    with state.router.hold(whole=True):
        out = state.inner(model, live, (), {**call, "return_dict": True})
    here, wanted = out["logits"].shape[1], method.virtual_tokens + labels.shape[1]
    if rows is not None or here != wanted:
        raise ValueError(
            f"{type(method).__name__} computes its own loss, for {method.virtual_tokens} virtual tokens and {labels.shape[1]} "
            f"labels in each row, and there are {here} logits; call with labels only where it is the one soft prompt of all "
            "rows (no adapter_names, no logits_to_keep)"
        )
    loss = method.objective(out["logits"], labels, inputs)
    made = {**out, "loss": loss, "logits": out["logits"][:, method.virtual_tokens :]}
    out = type(out)(**made)  # anew, so that the loss comes first
    return out.to_tuple() if as_tuple else out


def own_rows(rows: Sequence[int], count: int, x: Tensor) -> Tensor:
    """Where x (batch, ...) has some of `count` rows; `generate` repeats each row for its beams."""
    repeat = x.shape[0] // count
    return torch.tensor([i * repeat + k for i in rows for k in range(repeat)], device=x.device)


def picked(value: Any, own: Tensor, x: Tensor) -> Any:
    """Some rows of an argument that has as many as x; any other as it is."""
    whole = isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]
    return value.index_select(0, own) if whole else value


def copy_name(adapter: str) -> str:
    """Name under which an adapter's full copy of a module is registered on that module."""
    return f"copy:{adapter}"


def with_weights(target: nn.Module, layer: nn.Module, site: Site, links: list[Link | Fork]) -> nn.Module:
    """A stand-in for `target` in which the site's parameter has its effective value."""
    value, bias = site.kind.lazy(site, links), site.current_bias()
    if value is None:
        weight, bias = site.kind.compose(site, links, site.current_weight(), bias)
        value = site.kind.restored(site, weight)
    if target is layer:
        target = stand_in(layer)
    if site.owner is layer:
        target._parameters[site.param] = value  # type: ignore[assignment]
        if site.geometry.bias:
            target._parameters[site.kind.bias] = bias  # type: ignore[assignment]
        return target
    for child_name, child in layer._modules.items():
        if child is site.owner:
            child_target = stand_in(child)
            child_target._parameters[site.param] = value  # type: ignore[assignment]
            if site.geometry.bias:
                child_target._parameters[site.kind.bias] = bias  # type: ignore[assignment]
            target._modules[child_name] = child_target
    return target


def stand_in(module: nn.Module, **attributes: Any) -> nn.Module:
    """A shallow double of `module`, of its base class, whose parameters can be set without touching it.

    It lives for one call, so several threads can use the module at once.
    """
    base = getattr(type(module), "_veneer_base", type(module))
    double: nn.Module = object.__new__(base)
    state = dict(module.__dict__)
    for name in ("forward", "_old_forward", "_hf_hook", "_veneer"):
        state.pop(name, None)
    state["_parameters"] = dict(state["_parameters"])
    state["_modules"] = dict(state["_modules"])
    state.update(attributes)
    double.__dict__.update(state)
    return double


def take_over(layer: nn.Module, router: Router) -> Takeover:
    """Swap the layer's class, keeping a forward that others put on the instance.

    accelerate's dispatch shadows the class with an instance-level `forward` that calls `_old_forward`; left
    alone, the base layer would silently run without its adapters.
    """
    state = layer.__dict__.get("_veneer")
    if isinstance(state, Takeover):
        return state
    state = Takeover(layer, router)
    own = layer.__dict__.get("forward")
    split = tensor_parallel.style_of(layer)
    if split is not None:
        state.split = split
        layer.__dict__["_veneer"] = state
        layer.__class__ = adapted_class(state.base)
        tensor_parallel.put_around(layer, *split)
        return state
    if own is not None and "_old_forward" not in layer.__dict__:
        if not isinstance(own, types.MethodType):
            raise TypeError(
                f"{type(layer).__name__}: its `forward` was replaced on the instance by {own!r}, which is not a "
                "method, so an adapter cannot run inside it; attach the adapter first, then replace forward"
            )
        state.instance_forward = own.__func__
        del layer.__dict__["forward"]
    layer.__dict__["_veneer"] = state
    layer.__class__ = adapted_class(state.base)
    if "_old_forward" in layer.__dict__:
        layer.__dict__["_old_forward"] = types.MethodType(type(layer).forward, layer)
    return state


def take_over_carrier(block: nn.Module, router: Router, name: str, place: int) -> None:
    """Let a block take a prefix although checkpointing takes its cache away."""
    take_over(block, router).carries = (name, place)


def give_back(layer: nn.Module) -> None:
    """Undo `take_over`."""
    state: Takeover = layer.__dict__.pop("_veneer")
    layer.__class__ = state.base
    if state.split is not None:
        tensor_parallel.put_back(layer, *state.split)
    if state.instance_forward is not None:
        layer.__dict__["forward"] = types.MethodType(state.instance_forward, layer)
    if "_old_forward" in layer.__dict__:
        layer.__dict__["_old_forward"] = types.MethodType(state.base.forward, layer)
