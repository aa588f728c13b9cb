"""Finds the sites that a config names, without touching the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .. import layers
from ..backends import backend_of, bare_of
from ..injection.dispatch import state_of
from ..injection.entries import AdaptedSite, AdapterAtSite
from ..injection.interceptors import Interceptor, LayerWeights, ModuleCopies, ModuleOutputs
from ..injection.router import Router
from ..layers.kind import LayerKind
from ..methods.base import Method, OtherSublayers
from ..targets import select
from ..targets.blocks import SublayerOutput

if TYPE_CHECKING:
    from ..prompts.prompt_stack import PromptStack


@dataclass
class PlannedSite:
    """A site about to receive an adapter: planned first, committed once nothing can fail any more."""

    site: AdaptedSite
    layer: nn.Module  # the module whose forward is taken over
    interceptor: type[Interceptor]  # what acts for it at the layer
    entry: AdapterAtSite
    values: dict[str, Tensor] = field(default_factory=dict)  # attribute -> parameter or buffer
    whole: nn.Module | None = None  # a full copy
    door: PromptStack | None = None
    has_tensors: bool = True  # False at the model, if it is a site because a method computes its loss

    @property
    def copies_module(self) -> bool:
        """Whether the adapter is a trained copy of the module."""
        return self.interceptor is ModuleCopies

    @property
    def is_layer(self) -> bool:
        """Whether operators act on the layer's input and output."""
        return self.interceptor is LayerWeights and not self.site.bare


class SiteFinder:
    """Resolves a config to planned sites of one model.

    Attributes:
        root: the base model.
        router: of its adapters.
        known: the sites that have adapters already, by name.
        modules: the model's modules, by name.
        sublayers_of: sub-layers that another adapter of the model adapts, by its name.
    """

    def __init__(
        self,
        root: nn.Module,
        router: Router,
        known: Mapping[str, AdaptedSite],
        modules: Mapping[str, nn.Module],
        sublayers_of: OtherSublayers,
    ) -> None:
        self.root, self.router, self.known, self.modules = root, router, known, modules
        self.sublayers_of = sublayers_of

    def resolve_sites(self, config: Method, taken: Sequence[PlannedSite], copied: set[str]) -> list[PlannedSite]:
        """The sites that one config names."""
        if config.acts_on == "stacks":
            return self._of_stacks(config)
        named = config.sites_of(self.root, self.sublayers_of)
        if named is None:
            found = select.resolve_targets(self.root, config.target_query(), supported=layers.is_supported, skip=copied)
            places = [p for name in found.modules for p in self._of_module(name, config)]
            return places + self._of_parameters(found.parameters, config)
        if config.acts_on == "copies":
            return self._of_copies(named, config, taken)
        if config.acts_on == "modules":
            spots = named if isinstance(named, Mapping) else {}
            return [self._of_whole_module(n, config, spots.get(n)) for n in named]
        parameters = [n for n in named if self._is_parameter(n)]
        inside = tuple(f"{name}." for name in copied)  # a full copy brings its own bias
        parameters = [n for n in parameters if not n.startswith(inside)]
        mine = {id(p.site.owner) for p in taken if not p.copies_module}
        parameters = [n for n in parameters if id(self.modules[n.rpartition(".")[0]]) not in mine]
        keys = named if isinstance(named, Mapping) else {}
        places = []
        for name in (n for n in named if not self._is_parameter(n)):
            for place in self._of_module(name, config):
                place.entry.key = keys.get(name, place.entry.key)
                places.append(place)
        for name in parameters:
            places.append(self._of_bias(name, config) or self._of_parameter(name, keys.get(name, name), config))
        return places

    def _of_module(self, name: str, config: Method) -> list[PlannedSite]:
        module = self.modules[name]
        parent = self.modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):  # its out_proj is a weight to it; the forward is never called
            return [
                self._planned(
                    self._site(name, name, parent, module, layers.OUT_PROJECTION), parent, LayerWeights, config
                )
            ]
        if isinstance(module, nn.MultiheadAttention):
            inner = self._site(f"{name}.in_proj_weight", name, module, module, layers.IN_PROJECTION)
            outer = self._site(
                f"{name}.out_proj", f"{name}.base_layer.out_proj", module, module.out_proj, layers.OUT_PROJECTION
            )
            return [
                self._planned(inner, module, LayerWeights, config),
                self._planned(outer, module, LayerWeights, config),
            ]
        kind = layers.kind_of(module)
        if kind is None:
            raise TypeError(f"{name}: {type(module).__name__} is no layer that operators can act on")
        return [self._planned(self._site(name, name, module, module, kind), module, LayerWeights, config)]

    def _of_parameters(self, names: Sequence[str], config: Method) -> list[PlannedSite]:
        # peft nests one wrapper for each parameter of a module, the first named innermost.
        owners = Counter(n.rpartition(".")[0] for n in names)
        seen: Counter[str] = Counter()
        places = []
        for name in names:
            owner = name.rpartition(".")[0]
            seen[owner] += 1
            places.append(self._of_parameter(name, owner + ".base_layer" * (owners[owner] - seen[owner]), config))
        return places

    def _of_parameter(self, name: str, key: str, config: Method) -> PlannedSite:
        owner_name, _, param = name.rpartition(".")
        owner = self.modules[owner_name]
        site = self._site(name, key, owner, owner, layers.PARAMETER, param)
        place = self._planned(site, owner, LayerWeights, config)
        place.entry.key = key
        return place

    def _of_bias(self, name: str, config: Method) -> PlannedSite | None:
        """A layer's bias is adapted at the layer, where it stacks with what other adapters do to the output."""
        owner_name, _, leaf = name.rpartition(".")
        owner = self.modules[owner_name]
        if not layers.is_supported(owner):
            return None
        for place in self._of_module(owner_name, config):
            site = place.site
            if site.owner is owner and site.geometry.bias and site.kind.bias == leaf:
                place.entry.key = owner_name
                return place
        return None

    def _of_copies(self, names: Iterable[str], config: Method, taken: Sequence[PlannedSite]) -> list[PlannedSite]:
        places, names = [], list(names)
        for name in names:
            if any(name.startswith(f"{other}.") for other in names):
                continue  # the copy of what it is in holds it
            module = self.modules[name]
            inside = [p.site.name for p in taken if (p.site.name + ".").startswith(name + ".")]
            if inside:
                raise ValueError(
                    f"modules_to_save: {name!r} is also adapted (at {inside[0]!r}); a full copy leaves nothing to "
                    "adapt: take it out of target_modules or out of modules_to_save"
                )
            site = self.known.get(f"{name} (copy)") or AdaptedSite(
                f"{name} (copy)", name, module, "", layers.OPAQUE, None, self.router
            )
            places.append(self._planned(site, module, ModuleCopies, config))
        return places

    def _of_stacks(self, config: Method) -> list[PlannedSite]:
        """The stacks into which a config's virtual tokens go, and the model if it says the loss."""
        from ..prompts import prompt_stack  # only the methods that need them pay for importing them
        from ..prompts.objective import ModelObjective
        from ..prompts.stacks import find_stacks

        stacks = find_stacks(self.root)
        roles = config.roles(tuple(stacks))
        places = []
        for role in roles:
            name = f"{stacks[role]} ({role})"
            known = self.known.get(name)
            if known is not None:
                state = state_of(known.owner)
                opened = None if state is None else state.find(prompt_stack.PromptStack)
                assert opened is not None
            else:
                module = self.modules[stacks[role]]
                opened = prompt_stack.inspect_stack(
                    AdaptedSite(name, "", module, "", prompt_stack.PROMPT_STACK, None, self.router), role, self.root
                )
                opened.site.role = role
            prompt_stack.check_stack_fits(opened, config.virtual_tokens, "prefix" in config.hooks)
            place = self._planned(opened.site, opened.site.owner, prompt_stack.PromptStack, config)
            place.door = opened
            places.append(place)
        if "objective" in config.hooks:
            site = self.known.get("(objective)") or AdaptedSite(
                "(objective)", "", self.root, "", layers.MODULE, None, self.router
            )
            places.append(replace(self._planned(site, self.root, ModelObjective, config), has_tensors=False))
        return places

    def _of_whole_module(self, name: str, config: Method, spot: SublayerOutput | None) -> PlannedSite:
        module = self.modules[name]
        known = self.known.get(f"{name} (module)")
        site = known or AdaptedSite(f"{name} (module)", name, module, "", layers.MODULE, None, self.router)
        while name and not any(":" not in n for n, _ in site.near.named_parameters()):
            name = name.rpartition(".")[0]  # a dropout has no tensors: dtype and device are its block's
            site.near = self.modules[name]
        if spot is not None and site.spot is None:
            site.spot, site.fan_in, site.fan_out = spot, spot.fan_in, spot.width
            site.norm = self.modules[spot.norm] if spot.norm else None
        return self._planned(site, module, ModuleOutputs, config)

    def _site(
        self, name: str, key: str, layer: nn.Module, owner: nn.Module, kind: LayerKind, param: str | None = None
    ) -> AdaptedSite:
        known = self.known.get(name)
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
        return AdaptedSite(name, key, owner, param, kind, backend, self.router)

    def _planned(
        self, site: AdaptedSite, layer: nn.Module, interceptor: type[Interceptor], config: Method
    ) -> PlannedSite:
        method = config.at(site.name)
        names = method.file_names(site)
        return PlannedSite(site, layer, interceptor, AdapterAtSite(method, site.key, names))

    def _is_parameter(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        return leaf in self.modules[owner]._parameters
