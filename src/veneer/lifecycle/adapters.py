"""Attach, switch, merge, delete: the life of adapters on one model. Knows no method by name."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import layers
from ..backends import backend_of, bare_of, prepare_for_gradients
from ..distributed import offload, sharding, tensor_parallel, torch_fastpath
from ..injection.class_swap import adapt_class, adapted_class, restore_class
from ..injection.dispatch import AdaptedState
from ..injection.entries import AdapterAtSite, copy_name
from ..injection.router import AdapterExpr, CombinedExpr, Router, adapter_names, as_stack
from ..io import fingerprint
from ..kernels.plan import arrange
from ..layers.kind import LayerKind
from ..layers.site import Site
from ..methods.base import Method
from ..prompts import prompt_stack
from ..prompts.prompt_stack import PROMPT_STACK
from ..prompts.stacks import find_stacks
from ..targets import defaults, select, suggest
from ..targets.blocks import SublayerOutput
from .keys import PREFIX, file_key, prefix_of
from .load_report import AdapterLoadError, Loader, LoadReport
from .merge import merge_site, restore
from .plan import AttachPlan, PlannedSite, attr_of, check_name, copy_module, parameter_dtype, short_names

if TYPE_CHECKING:
    from ..serving.slots import Slots


ATTRIBUTE = "_veneer_runtime"


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime attached to a base model, or None."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Runtime) else None


class Runtime:
    """The adapters of one base model.

    Attributes:
        root: the base model.
        router: which adapters act.
        configs: adapter name -> its config, a private copy.
        sites: site name -> site.
        places: adapter name -> the sites it has, in the model's order.
        slots: room for further low-rank adapters, or None.
        base: fingerprint of the base model from before anything was attached, or None.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.router = Router()
        self.router.runtime = weakref.ref(self)
        self.configs: dict[str, Method] = {}
        self.sites: dict[str, Site] = {}
        self.layers: dict[str, nn.Module] = {}  # site name -> the layer taken over for it
        self.places: dict[str, list[Site]] = {}
        self.slots: Slots | None = None
        self.base: fingerprint.Fingerprint | None = None
        self.named: dict[str, nn.Module] = {}  # the model's modules, while an adapter is being attached

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.router.runtime = weakref.ref(self)

    @classmethod
    def ensure(cls, root: nn.Module) -> Runtime:
        found = runtime_of(root)
        return found if found is not None else cls(root)

    # Attaching.

    def attach(
        self,
        adapter: str,
        config: Method,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        prefix: str = PREFIX,
        strict: bool = True,
        trainable: bool = True,
        autocast: bool = True,
        meta: bool = False,
    ) -> LoadReport:
        """Add an adapter. Either all of it is attached or nothing is changed.

        Args:
            adapter: its name.
            config: copied, so changing it later does not change the adapter.
            tensors: values by their key in the file; None starts fresh.
            prefix: what the keys of `tensors` begin with.
            strict: whether keys that do not fit raise, or only warn.
            trainable: `requires_grad` of the adapter's parameters.
            autocast: keep the parameters in float32 where the base is in half precision.
            meta: make fresh tensors on the meta device.

        Raises:
            ValueError: a name that is taken or not allowed; targets that do not exist; a hyper-parameter that
                does not fit a layer.
            AdapterLoadError: `tensors` do not fit and `strict` is set.
            RuntimeError: the model's parameters are already sharded.
        """
        check_name(adapter, self.configs)
        rules: dict[str, Any] = {"prefix": prefix, "strict": strict, "autocast": autocast, "meta": meta}
        with self.looking(), tensor_parallel.mixing():
            sharding.refuse_attaching(self.root, self.named)
            draft = self.draft(adapter, config, tensors=tensors, **rules)
            self.commit(adapter, draft.config, draft.places, draft.shared, trainable, draft.overrides)
        if trainable and any(p.site.backend is not None and p.site.backend.packed for p in draft.places):
            from ..training.watch import look_once

            look_once(self.root)
        return draft.report

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within the block, the model's modules are listed in `named`."""
        before = self.named
        self.named = before or dict(self.root.named_modules())
        try:
            yield
        finally:
            self.named = before

    def draft(
        self,
        adapter: str,
        config: Method,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        prefix: str = PREFIX,
        strict: bool = True,
        autocast: bool = True,
        meta: bool = False,
    ) -> AttachPlan:
        """An adapter with its tensors, without touching the model; arguments and errors as of `attach`."""
        with self.looking():
            config = copy.deepcopy(config).prepare(self.root)
            prefix = prefix_of(config, prefix)
            loader = None if tensors is None else Loader(tensors, strict)
            plan: list[PlannedSite] = []
            shared: dict[str, Tensor] = {}
            parts = [config, *config.companions(self.root)]
            copied = {n for part in parts if part.whole_module for n in part.sites_of(self.root) or ()}
            for part in parts:
                places, drawn = self.plan(adapter, part, plan, copied, loader, prefix, autocast, meta)
                plan += places
                shared |= drawn
            overrides = {} if loader is None else self.settle(loader, prefix, strict, adapter)
            report = LoadReport() if loader is None else loader.report
            return AttachPlan(self.described(config, plan), plan, shared, overrides, report)

    def plan(
        self,
        adapter: str,
        config: Method,
        taken: Sequence[PlannedSite],
        copied: set[str],
        loader: Loader | None,
        prefix: str,
        autocast: bool,
        meta: bool,
    ) -> tuple[list[PlannedSite], dict[str, Tensor]]:
        """Choose the sites of one config and make its tensors, without touching the model."""
        places = self.choose(config, taken, copied)
        shared = self.share(adapter, config, [p.site for p in places], loader, meta)
        first: PlannedSite | None = None
        for place in places:
            if place.role == "opaque":
                place.whole = copy_module(place, loader, prefix)
                continue
            if place.role == "objective":
                place.entry.saved = False
                continue
            site, entry = place.site, place.entry
            home = site.home
            site.device = torch.device("meta") if loader is not None or meta else home
            site.dtype = parameter_dtype(site, autocast)
            fresh = entry.method.init(site) if loader is None else entry.method.loaded(site)
            if first is not None:  # all sites use the first one's tensors
                save = config.saves_every_site
                self.assign(place, adapter, {k: first.values[attr_of(first, k, adapter)] for k in fresh}, save=save)
                for key, _ in entry.trained if save and loader is not None else ():
                    loader.left.pop(file_key(prefix, entry, key), None)  # type: ignore[union-attr]
                continue
            if loader is not None:
                self.fill(place, fresh, loader, prefix, home)
            if config.one_for_all:
                kept = entry.method.frozen
                fresh = {k: t if k in kept else nn.Parameter(t) for k, t in fresh.items()}
                first = place
            self.assign(place, adapter, fresh)
        return places, shared

    def fill(
        self, place: PlannedSite, fresh: dict[str, Tensor], loader: Loader, prefix: str, home: torch.device
    ) -> None:
        """Replace the shapes in `fresh` by the file's tensors."""
        site, entry = place.site, place.entry
        for key, shape in fresh.items():
            if key not in entry.names:
                continue
            wanted = file_key(prefix, entry, key)
            if wanted not in loader.left and key in entry.method.aliases:
                other = wanted.removesuffix(entry.names[key]) + entry.method.aliases[key]
                wanted = other if other in loader.left else wanted
            found = loader.take(wanted, shape.shape)
            if found is not None:
                device = found.device if home.type == "meta" else home  # onto a skeleton, values stay where they are
                fresh[key] = found.to(device=device, dtype=site.dtype)
        # What the file does not bring, and what a lenient load leaves at its start.
        lacking = [k for k, t in fresh.items() if t.device.type == "meta"]
        refused = loader.strict and not loader.report.clean  # then nothing more is made for it
        if lacking and home.type != "meta" and not refused:
            site.device = home
            start = entry.method.loaded(site)
            fresh.update({k: start[k] for k in lacking})

    def assign(self, place: PlannedSite, adapter: str, fresh: Mapping[str, Tensor], *, save: bool = True) -> None:
        """Give a place its tensors under the attribute names they get on the layer."""
        entry, method = place.entry, place.entry.method
        entry.trained = tuple((k, attr_of(place, k, adapter)) for k in fresh if k not in method.frozen)
        entry.frozen = tuple((k, attr_of(place, k, adapter)) for k in fresh if k in method.frozen)
        entry.shared = tuple(method.shared_names)
        entry.saved = save
        place.values = {attr_of(place, k, adapter): t for k, t in fresh.items()}

    def share(
        self, adapter: str, config: Method, sites: list[Site], loader: Loader | None, meta: bool
    ) -> dict[str, Tensor]:
        """Tensors shared between the sites: from the file where it has them, else drawn anew."""
        if not config.shared_names:
            return {}
        home = sites[0].home
        drawn: dict[str, Tensor] = {}
        if loader is not None:
            for key, name in config.shared_names.items():
                found = loader.left.pop(f"base_model.{name}", loader.left.pop(name, None))
                if found is not None:
                    drawn[key] = found
            if len(drawn) == len(config.shared_names):
                return {k: t.to(device=home) for k, t in drawn.items()}
            if config.saves_shared:
                lacking = [f"base_model.{n}" for k, n in config.shared_names.items() if k not in drawn]
                loader.report.missing += lacking
        fresh = config.init_shared(sites)
        return {k: drawn.get(k, t).to(device="meta" if meta else home) for k, t in fresh.items()}

    def choose(self, config: Method, taken: Sequence[PlannedSite], copied: set[str]) -> list[PlannedSite]:
        """The sites that one config names."""
        if config.enters:
            return self.door_places(config)
        named = config.sites_of(self.root)
        if named is None:
            found = select.resolve(self.root, config, supported=layers.supported, skip=copied)
            places = [p for name in found.modules for p in self.module_places(name, config)]
            return places + self.parameter_places(found.parameters, config)
        if config.whole_module:
            return self.copy_places(named, config, taken)
        if config.on_modules:
            spots = named if isinstance(named, Mapping) else {}
            return [self.whole_place(n, config, spots.get(n)) for n in named]
        parameters = [n for n in named if self.is_parameter(n)]
        inside = tuple(f"{name}." for name in copied)  # a full copy brings its own bias
        parameters = [n for n in parameters if not n.startswith(inside)]
        mine = {id(p.site.owner) for p in taken if p.role != "opaque"}
        parameters = [n for n in parameters if id(self.module(n.rpartition(".")[0])) not in mine]
        keys = named if isinstance(named, Mapping) else {}
        places = []
        for name in (n for n in named if not self.is_parameter(n)):
            for place in self.module_places(name, config):
                place.entry.key = keys.get(name, place.entry.key)
                places.append(place)
        for name in parameters:
            places.append(self.bias_place(name, config) or self.place_parameter(name, keys.get(name, name), config))
        return places

    def module(self, name: str) -> nn.Module:
        return self.named[name]

    def is_parameter(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return leaf in self.named[owner]._parameters

    def module_places(self, name: str, config: Method) -> list[PlannedSite]:
        module = self.module(name)
        parent = self.module(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):  # its out_proj is a weight to it; the forward is never called
            return [self.place(self.site(name, name, parent, module, layers.OUT_PROJECTION), parent, "bare", config)]
        if isinstance(module, nn.MultiheadAttention):
            inner = self.site(f"{name}.in_proj_weight", name, module, module, layers.IN_PROJECTION)
            outer = self.site(
                f"{name}.out_proj", f"{name}.base_layer.out_proj", module, module.out_proj, layers.OUT_PROJECTION
            )
            return [self.place(inner, module, "bare", config), self.place(outer, module, "bare", config)]
        kind = layers.kind_of(module)
        if kind is None:
            raise TypeError(f"{name}: {type(module).__name__} is no layer that operators can act on")
        return [self.place(self.site(name, name, module, module, kind), module, "main", config)]

    def parameter_places(self, names: Sequence[str], config: Method) -> list[PlannedSite]:
        # peft nests one wrapper for each parameter of a module, the first named innermost.
        owners = Counter(n.rpartition(".")[0] for n in names)
        seen: Counter[str] = Counter()
        places = []
        for name in names:
            owner = name.rpartition(".")[0]
            seen[owner] += 1
            places.append(self.place_parameter(name, owner + ".base_layer" * (owners[owner] - seen[owner]), config))
        return places

    def place_parameter(self, name: str, key: str, config: Method) -> PlannedSite:
        owner_name, _, param = name.rpartition(".")
        owner = self.module(owner_name)
        site = self.site(name, key, owner, owner, layers.PARAMETER, param)
        place = self.place(site, owner, "bare", config)
        place.entry.key = key
        return place

    def bias_place(self, name: str, config: Method) -> PlannedSite | None:
        """A layer's bias is adapted at the layer, where it stacks with what other adapters do to the output."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.module(owner_name)
        if not layers.supported(owner):
            return None
        for place in self.module_places(owner_name, config):
            site = place.site
            if site.owner is owner and site.geometry.bias and site.kind.bias == leaf:
                place.entry.key = owner_name
                return place
        return None

    def copy_places(self, names: Iterable[str], config: Method, taken: Sequence[PlannedSite]) -> list[PlannedSite]:
        places, names = [], list(names)
        for name in names:
            if any(name.startswith(f"{other}.") for other in names):
                continue  # the copy of what it is in holds it
            module = self.module(name)
            inside = [p.site.name for p in taken if (p.site.name + ".").startswith(name + ".")]
            if inside:
                raise ValueError(
                    f"modules_to_save: {name!r} is also adapted (at {inside[0]!r}); a full copy leaves nothing to "
                    "adapt: take it out of target_modules or out of modules_to_save"
                )
            site = self.sites.get(f"{name} (copy)") or Site(
                f"{name} (copy)", name, module, "", layers.OPAQUE, None, self.router
            )
            places.append(self.place(site, module, "opaque", config))
        return places

    def door_places(self, config: Method) -> list[PlannedSite]:
        """The stacks into which a config's virtual tokens go, and the model if it says the loss."""
        stacks = find_stacks(self.root)
        roles = config.roles(tuple(stacks))
        places = []
        for role in roles:
            name = f"{stacks[role]} ({role})"
            known = self.sites.get(name)
            if known is not None:
                opened = known.owner.__dict__["_veneer"].door
            else:
                module = self.module(stacks[role])
                opened = prompt_stack.inspect_stack(
                    Site(name, "", module, "", PROMPT_STACK, None, self.router), role, self.root
                )
                opened.site.role = role
            prompt_stack.check_stack_fits(opened, config.virtual_tokens, "prefix" in config.hooks)
            place = self.place(opened.site, opened.site.owner, "door", config)
            place.door = opened
            places.append(place)
        if "objective" in config.hooks:
            site = self.sites.get("(objective)") or Site(
                "(objective)", "", self.root, "", layers.MODULE, None, self.router
            )
            places.append(self.place(site, self.root, "objective", config))
        return places

    def whole_place(self, name: str, config: Method, spot: SublayerOutput | None) -> PlannedSite:
        module = self.module(name)
        known = self.sites.get(f"{name} (module)")
        site = known or Site(f"{name} (module)", name, module, "", layers.MODULE, None, self.router)
        while name and not any(":" not in n for n, _ in site.near.named_parameters()):
            name = name.rpartition(".")[0]  # a dropout has no tensors: dtype and device are its block's
            site.near = self.module(name)
        if spot is not None and site.spot is None:
            site.spot, site.fan_in, site.fan_out = spot, spot.fan_in, spot.width
            site.norm = self.module(spot.norm) if spot.norm else None
        return self.place(site, module, "module", config)

    def site(
        self, name: str, key: str, layer: nn.Module, owner: nn.Module, kind: LayerKind, param: str | None = None
    ) -> Site:
        known = self.sites.get(name)
        if known is not None:
            return known
        param = param or kind.weight_of(owner)
        kind.check(owner, param, name)
        backend = backend_of(owner, param, name)
        if backend.packed and not kind.packable and param not in bare_of(owner):
            raise TypeError(
                f"{name}: {type(owner).__name__}.{param} is stored as {backend.name}, which only the forward of a linear "
                f"layer can use, and this place is a {kind.name}; name linear layers in target_modules, or leave this one "
                "unquantized when loading the base model"
            )
        return Site(name, key, owner, param, kind, backend, self.router)

    def place(self, site: Site, layer: nn.Module, role: str, config: Method) -> PlannedSite:
        method = config.at(site.name)
        names = method.file_names(site)
        return PlannedSite(site, layer, role, AdapterAtSite(method, site.key, names))

    def settle(
        self, loader: Loader, prefix: str, strict: bool, adapter: str
    ) -> dict[str, tuple[nn.Module, str, Tensor]]:
        """Deal with keys that found no place; return those that are base tensors, to be loaded as such."""
        overrides: dict[str, tuple[nn.Module, str, Tensor]] = {}
        head = getattr(self.root, "get_output_embeddings", lambda: None)()
        vocabulary = {id(head), *(id(m) for m in self.named.values() if isinstance(m, nn.Embedding))}
        for key in list(loader.left):
            name = key.removeprefix(prefix).removesuffix(".weight").removesuffix(".base_layer")
            module: nn.Module | None = self.named.get(name) if key.endswith(".weight") else None
            if module is None or id(module) not in vocabulary:
                continue
            value, weight = loader.left.pop(key), module._parameters["weight"]
            assert weight is not None
            if value.shape != weight.shape:
                loader.report.mismatched.append((key, tuple(value.shape), tuple(weight.shape)))
            elif weight.device.type == "meta" or not torch.equal(value.to(weight), weight):
                overrides[key] = (module, "weight", value)
        if overrides:
            names = ", ".join(sorted(overrides))
            warnings.warn(
                f"adapter {adapter!r} brings weights of the base model, which replace its own: {names}", stacklevel=2
            )
        loader.report.unexpected = sorted(loader.left)
        if not loader.report.clean:
            text = (
                f"adapter {adapter!r} does not fit its file:\n  {loader.report.describe()}\n"
                f"Likely cause: {loader.report.cause()}."
            )
            if strict:
                raise AdapterLoadError(text + " Pass strict=False to load what fits.", loader.report)
            warnings.warn(text, stacklevel=2)
        return overrides

    def described(self, config: Method, plan: Sequence[PlannedSite]) -> Method:
        """Fill in what the file has to say: resolved targets, copied modules, transposed layers."""
        mine = [p for p in plan if type(p.entry.method) is type(config)]
        if hasattr(config, "target_modules") and config.sites_of(self.root) is None:
            wanted = config.target_modules
            if wanted is None and (default := select.wanted(self.root, config)[0]) is not None:
                config = config.replace(target_modules=default)
            elif isinstance(wanted, str) and wanted.lower() == select.ALL_LINEAR:
                names = [p.site.name for p in mine if p.role == "main"]
                config = config.replace(target_modules=short_names(names, self.root))
        elif getattr(config, "target_modules", "") is None:
            config = config.replace(
                target_modules=defaults.default_targets(config.peft_name, defaults.model_type(self.root))
            )
        if hasattr(config, "fan_in_fan_out"):
            config.fan_in_fan_out = any(p.site.kind.name == "Conv1D" for p in mine)
        kept = getattr(config, "modules_to_save", None)
        for part in config.companions(self.root):
            if part.whole_module:
                kept = [*getattr(part, "modules", []), *getattr(part, "optional", [])]
        if kept is not None:
            config.modules_to_save = kept  # type: ignore[attr-defined]
        return config

    def settle_down(self) -> None:
        """Freeze a base model that has nothing of ours so far, and stay with it."""
        if runtime_of(self.root) is None:
            prepare_for_gradients(self.root)
            self.known_base()
            self.root.requires_grad_(False)
            self.root.__dict__[ATTRIBUTE] = self

    def known_base(self) -> fingerprint.Fingerprint:
        """The base model's fingerprint; of a skeleton it is taken again when there are values."""
        if self.base is None or not self.base.weights:
            self.base = fingerprint.of(self.root)
        return self.base

    def note_tokenizer(self, tokenizer: Any) -> None:
        """Let the fingerprint that is saved with adapters say which tokenizer they are for."""
        self.base = replace(self.known_base(), tokenizer=fingerprint.of_tokenizer(tokenizer))

    def commit(
        self,
        adapter: str,
        config: Method,
        plan: Sequence[PlannedSite],
        shared: Mapping[str, Tensor],
        trainable: bool,
        overrides: Mapping[str, tuple[nn.Module, str, Tensor]],
    ) -> None:
        """Put a finished plan into the model."""
        self.settle_down()
        sites = []
        for place in plan:
            site, layer = place.site, place.layer
            state = adapt_class(layer, self.router)
            if place.role == "main":
                state.main = site
            elif place.role == "bare":
                if site not in state.bare:
                    state.bare.append(site)
            elif place.role == "module":
                state.module = site
                if site.spot is not None and site.spot.residual:
                    tapped = adapt_class(self.module(site.spot.residual), self.router).tapped
                    tapped += [site] if site not in tapped else []
            elif place.role == "door":
                assert place.door is not None
                prompt_stack.attach_stack(place.door, self.router)
            elif place.role == "objective":
                state.objective = site
            else:
                state.opaque = site
            frozen = {attr for _, attr in place.entry.frozen}
            for attr, value in site.split(place.values, place.entry).items():
                if attr in frozen:
                    site.owner._buffers[attr] = value
                    site.owner._non_persistent_buffers_set.add(attr)
                elif isinstance(value, nn.Parameter):  # shared by several sites
                    value.requires_grad = trainable
                    site.owner._parameters[attr] = value
                else:
                    site.owner._parameters[attr] = nn.Parameter(value, requires_grad=trainable)
                    if sharding.is_distributed(value):
                        tensor_parallel.gather_gradients(site.owner._parameters[attr])  # type: ignore[arg-type]
            if place.whole is not None:
                place.whole.requires_grad_(trainable)
                layer._modules[copy_name(adapter)] = place.whole
            follows = place.role == "main" and place.entry.method.one_for_all and not site.lookup  # a tied head
            if follows or (place.whole is not None and layer._parameters):
                layer.__class__ = adapted_class(state.base, read=True)
            offload.keep_resident(site.owner)
            site.entries[adapter] = place.entry
            self.sites[site.name] = site
            self.layers[site.name] = layer
            sites.append(site)
        for key, tensor in shared.items():
            trained = key in config.trained_shared
            self.router.shared.put(adapter, key, nn.Parameter(tensor, requires_grad=trainable) if trained else tensor)
            self.root._modules.setdefault("veneer_shared", self.router.shared)
        for module, param, value in overrides.values():
            with torch.no_grad():
                module._parameters[param].copy_(value)  # type: ignore[union-attr]
        if any(issubclass(k, nn.TransformerEncoderLayer) for k in {type(m) for m in self.named.values()}):
            torch_fastpath.disable(self.root, [self.layers[s.name] for s in sites])
        prompt_stack.link_encoder(self.sites.values())
        self.configs[adapter] = config
        self.places[adapter] = sites
        self.arrange(sites)

    def arrange(self, sites: Iterable[Site]) -> None:
        """See which layers can run together, among those of `sites` and beside them."""
        linear = [s for s in sites if s.kind.own_forward() is not None or s.kind.packable]
        names = dict.fromkeys(s.name.rpartition(".")[0] for s in linear)
        parents = {n: self.root.get_submodule(n) for n in names if n in self.named or not self.named}
        found = arrange(parents.values())
        for parent in parents.values():
            if parent in found:
                adapt_class(parent, self.router).gated = found[parent]
            elif "_veneer" in parent.__dict__ and parent.__dict__["_veneer"].gated is not None:
                parent.__dict__["_veneer"].gated = None
                if not parent.__dict__["_veneer"].in_use:
                    restore_class(parent)
        self.router.changed()

    # Looking.

    def named_tensors(self, adapter: str, prefix: str = PREFIX) -> Iterator[tuple[str, Tensor]]:
        """The adapter's saved tensors with their keys in the file."""
        config = self.known(adapter)
        prefix = prefix_of(config, prefix)
        for site in self.places[adapter]:
            entry = site.entries[adapter]
            made = None if site.kind.whole or not entry.saved else entry.method.exported(site.tensors(adapter), site)
            if made is not None:
                for key, value in made.items():
                    yield file_key(prefix, entry, key), value
            elif site.kind.whole:
                copied = self.layers[site.name]._modules[copy_name(adapter)]
                assert copied is not None
                for name, value in copied.state_dict(keep_vars=True).items():
                    yield f"{prefix}{entry.key}.{name}", value
            elif entry.saved:
                for key, attr in entry.trained:
                    yield file_key(prefix, entry, key), site.owner._parameters[attr]  # type: ignore[misc]
        if config.saves_shared:
            for key, name in config.shared_names.items():
                yield ("base_model." if prefix else "") + name, self.router.shared.get(adapter, key)

    def computes_its_file(self, adapter: str) -> bool:
        """Whether what is saved is computed from what is trained."""
        for site in self.places[adapter]:
            entry = site.entries[adapter]
            if not site.kind.whole and entry.saved and entry.method.exported(site.tensors(adapter), site) is not None:
                return True
        return False

    def training_state(self, adapter: str) -> dict[str, Tensor]:
        """What is trained, the live Parameters, by the adapter's own names; a checkpoint needs it to go on."""
        found: dict[str, Tensor] = {}
        for site in self.places[adapter]:
            entry = site.entries[adapter]
            if site.kind.whole:
                copied = self.layers[site.name]._modules[copy_name(adapter)]
                assert copied is not None
                found |= {f"{entry.key}.{n}": t for n, t in copied.state_dict(keep_vars=True).items()}
            elif entry.saved:
                found |= {f"{site.key}|{k}": site.owner._parameters[a] for k, a in entry.trained}  # type: ignore[misc]
        return found

    def parameters(self, adapter: str) -> Iterator[nn.Parameter]:
        """The adapter's trained parameters, each once."""
        yield from self.router.shared.trained(adapter)
        seen = set()
        for site in self.places[adapter]:
            if site.kind.whole:
                copied = self.layers[site.name]._modules[copy_name(adapter)]
                found = list(copied.parameters()) if copied is not None else []
            else:
                found = [site.owner._parameters[a] for _, a in site.entries[adapter].trained]  # type: ignore[misc]
            for parameter in found:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def known(self, adapter: str) -> Method:
        if adapter not in self.configs:
            there = ", ".join(map(repr, self.configs)) or "none"
            raise ValueError(
                f"no adapter is named {adapter!r}; there are {there}{suggest.suggest(adapter, self.configs)}"
            )
        return self.configs[adapter]

    # Switching.

    def activate(self, names: AdapterExpr | Sequence[AdapterExpr]) -> None:
        """Make `names` the active adapters, stacked in that order. Does not touch `requires_grad`."""
        chosen = as_stack(names)
        if not all(n in self.configs for n in adapter_names(chosen)):
            for name in adapter_names(chosen):
                self.known(name)
        if self.router.merged and chosen != self.router.chosen and set(chosen) != set(self.router.merged):
            raise ValueError(
                f"adapters {list(self.router.merged)} are merged into the base weights; call unmerge_adapter() before "
                f"activating {list(chosen)}"
            )
        if chosen and (len(chosen) > 1 or isinstance(chosen[0], CombinedExpr)):
            self.check_together(chosen)
        self.router.set(chosen)

    def check_together(self, chosen: Sequence[AdapterExpr]) -> None:
        """Raise ValueError where adapters cannot be active at once, or not side by side."""
        taken: dict[str, str] = {}
        for item in chosen:
            for name in adapter_names([item]) if isinstance(item, CombinedExpr) else ():
                if not self.configs[name].hooks or self.configs[name].enters:
                    raise ValueError(
                        f"{item!r}: adapter {name!r} ({self.configs[name].peft_name}) makes no change to a layer's output "
                        "that could be added to another's; stack it instead: set_adapter([...])"
                    )
        for name in adapter_names(chosen):
            for site in self.places[name]:
                if site.kind.whole:
                    other = taken.setdefault(site.name, name)
                    if other != name:
                        raise ValueError(
                            f"adapters {other!r} and {name!r} both bring a full copy of {site.key!r}; only one of them "
                            "can be active at a time"
                        )

    # Merging.

    def merge(self, names: Sequence[AdapterExpr], *, check: bool = False, keep: bool = True) -> None:
        """Bake adapters into the base weights, computed in float32 and rounded once.

        Args:
            names: in the order in which they are stacked.
            check: raise, with everything as before, if a merged weight is not finite.
            keep: remember the base weights for `unmerge`.

        Raises:
            ValueError: an adapter cannot be expressed as a weight, or a weight would not be finite.
        """
        for name in adapter_names(names):
            self.known(name)
        already = self.router.merged
        wanted = (*already, *(n for n in names if n not in already))
        if wanted == already:
            warnings.warn("all of these adapters are merged already; nothing to do", stacklevel=3)
            return
        sites = [
            s for s in self.sites.values() if not s.kind.whole and any(n in s.entries for n in adapter_names(wanted))
        ]
        for site in sites:
            if site.backend is None:
                name = next(n for n in adapter_names(wanted) if n in site.entries)
                raise ValueError(
                    f"{site.name}: adapter {name!r} ({self.configs[name].peft_name}) acts on activations and cannot be "
                    "merged into weights; keep it unmerged, or name the adapters to merge in adapter_names"
                )
        done: list[Site] = []
        uses = self.uses()
        try:
            for site in sites:
                if site.original is not None:
                    restore(site)
                with sharding.available(site.owner._parameters.values(), change=True), tensor_parallel.mixing():
                    merge_site(site, wanted, uses, check)
                done.append(site)
                if not keep:
                    site.original = None
        except BaseException:
            for site in done:
                if site.original is not None:
                    restore(site)
            if already:
                self.router.set(merged=())
                self.merge(already)
            raise
        self.router.set(merged=wanted)

    def uses(self) -> Counter[int]:
        """How many modules have each parameter, by its id."""
        return Counter(id(p) for m in self.root.modules() for p in m._parameters.values() if p is not None)

    def merge_again(self, site: Site) -> None:
        """Merge anew at one site, after what is merged there was changed."""
        restore(site)
        merge_site(site, self.router.merged, self.uses(), False)

    def unmerge(self) -> None:
        """Put the exact bits of the base weights back."""
        for site in self.sites.values():
            if site.original is not None:
                restore(site)
        self.router.set(merged=())

    def combine(self, adapters: Sequence[str], weights: Sequence[float], name: str, **options: Any) -> None:
        """Add an adapter that is a weighted combination of others. It is frozen, and not active.

        Args:
            adapters: those to combine, all of one method. Where some are not, the others count alone.
            weights: one number for each of them.
            name: the new adapter's.
            **options: what the method's `combined` takes further.

        Raises:
            ValueError: unknown or taken names, as many weights as there are not adapters, different methods, a method
                that has no combination, configs that do not go together, full copies of one module in several.
        """
        check_name(name, self.configs)
        configs = [self.known(a) for a in adapters]
        if not configs or len(configs) != len(weights):
            raise ValueError(
                f"{len(configs)} adapters and {len(weights)} weights; give one or more adapters, and a weight for each"
            )
        if len({type(c) for c in configs}) > 1:
            kinds = ", ".join(f"{a!r} is {c.peft_name}" for a, c in zip(adapters, configs, strict=True))
            raise ValueError(f"only adapters of one method can be combined ({kinds}); stack them with set_adapter")
        config = configs[0].combined(configs[1:], **options)
        places = {p.site.name: p for p in self.draft(name, config, meta=True).places}
        tensors: dict[str, Tensor] = {}
        for site in self.sites.values():
            there = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in site.entries]
            place = places.pop(site.name, None)
            if not there:
                continue
            found = {type(site.entries[a].method).peft_name for a, _ in there}
            if place is None or found != {type(place.entry.method).peft_name}:
                raise ValueError(
                    f"{site.name}: here adapters {[a for a, _ in there]} are {', '.join(sorted(found))}, and their "
                    f"combination has {type(place.entry.method).peft_name if place else 'nothing'}; combine adapters whose "
                    "configs choose layers in the same way"
                )
            if site.kind.whole:
                if len({a for a, _ in there}) > 1:
                    raise ValueError(
                        f"adapters {[a for a, _ in there]} each bring a full copy of {site.key!r} (modules_to_save), and "
                        "copies cannot be combined; combine adapters of which only one does"
                    )
                copied = self.layers[site.name]._modules[copy_name(there[0][0])]
                tensors |= {f"{PREFIX}{place.entry.key}.{k}": v for k, v in copied.state_dict().items()}  # type: ignore[union-attr]
                continue
            if not site.entries[there[0][0]].saved:  # it follows another site
                continue
            with torch.no_grad(), sharding.available(site.owner._parameters.values()):
                parts = [(site.entries[a].method, site.tensors(a)) for a, _ in there]
                made = place.entry.method.combine(parts, [w for _, w in there], site)
            tensors |= {file_key(PREFIX, place.entry, k): v for k, v in made.items()}
        self.attach(name, config, tensors=tensors, trainable=False)

    def delete(self, adapter: str) -> None:
        """Remove an adapter; layers without any are given back as they were."""
        self.known(adapter)
        if adapter in adapter_names(self.router.merged):
            raise ValueError(f"adapter {adapter!r} is merged into the base weights; call unmerge_adapter() first")
        if needed := [n for n, c in self.configs.items() if adapter in c.uses]:
            raise ValueError(f"adapter {adapter!r} is used by {needed[0]!r}; delete that one first")
        sites = self.places.pop(adapter)
        for site in sites:
            entry = site.entries.pop(adapter)
            for _, attr in (*entry.trained, *entry.frozen):
                site.owner._parameters.pop(attr, None)
                site.owner._buffers.pop(attr, None)
                site.owner._non_persistent_buffers_set.discard(attr)
            layer = self.layers[site.name]
            layer._modules.pop(copy_name(adapter), None)
            if not site.entries:
                self.forget(site)
        self.arrange(sites)
        self.router.shared.drop(adapter)
        del self.configs[adapter]
        self.router.set(tuple(i for i in self.router.chosen if adapter not in adapter_names([i])))
        if not self.router.active and self.configs:
            self.router.set((next(iter(self.configs)),))
            warnings.warn(
                f"adapter {adapter!r} was the active one; {self.router.active[0]!r} is active now", stacklevel=3
            )

    def forget(self, site: Site) -> None:
        layer = self.layers.pop(site.name)
        del self.sites[site.name]
        state = layer.__dict__["_veneer"]
        if state.main is site:
            state.main = None
        if state.opaque is site:
            state.opaque = None
        if state.module is site:
            state.module = None
            if site.spot is not None and site.spot.residual:
                module = self.root.get_submodule(site.spot.residual)
                tapped: AdaptedState = module.__dict__["_veneer"]
                tapped.tapped.remove(site)
                if module is not layer and not tapped.in_use:
                    restore_class(module)
        if state.objective is site:
            state.objective = None
        if state.door is not None and state.door.site is site:
            prompt_stack.detach_stack(state.door)
            prompt_stack.link_encoder(self.sites.values())
        if site in state.bare:
            state.bare.remove(site)
        if not state.in_use:
            restore_class(layer)
            offload.release(layer)

    def unload(
        self, *, merge: Sequence[AdapterExpr] | None = None, check: bool = False, progress: bool = False
    ) -> nn.Module:
        """Take every adapter off and return the base model, with `merge` baked in for good."""
        if self.slots is not None:
            self.slots.release()
        if merge is None:
            self.unmerge()
        else:
            self.merge_for_good(merge, check)
        for adapter in list(self.configs):
            for site in list(self.places[adapter]):
                if site.kind.whole and merge and adapter in adapter_names(merge):
                    self.replace_module(site.key, self.layers[site.name]._modules[copy_name(adapter)])  # type: ignore[arg-type]
        self.router.set((), merged=())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for adapter in reversed(list(self.configs)):  # those that use others came later
                self.delete(adapter)
        self.root._modules.pop("veneer_shared", None)
        torch_fastpath.restore(self.root)
        self.root.__dict__.pop(ATTRIBUTE, None)
        return self.root

    def merge_for_good(self, names: Sequence[AdapterExpr], check: bool) -> None:
        missing = [n for n in names if n not in self.router.merged]
        if missing:
            self.merge(names, check=check)
        tied = [s for s in self.sites.values() if s.original is not None and s.original.parameter is not None]
        config = getattr(self.root, "config", None)
        if tied and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        for site in self.sites.values():
            site.original = None

    def replace_module(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        self.root.get_submodule(parent)._modules[leaf] = module
