"""An adapter's planned sites and tensors, before the model is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import layers
from ..injection.entries import AdaptedSite
from ..methods.base import Method
from ..methods.fields import SavedModules, TargetFields, TransposedField
from ..targets import defaults, select
from .find_sites import PlannedSite, SiteFinder
from .keys import HALF, PREFIX, file_key, prefix_of
from .load_report import AdapterLoadError, Loader, LoadReport
from .module_copy import copy_module

if TYPE_CHECKING:
    from .load_report import Loader, LoadReport


@dataclass
class AttachPlan:
    """An adapter that was planned and not yet put into the model."""

    config: Method
    sites: list[PlannedSite]
    shared: dict[str, Tensor]
    overrides: dict[str, tuple[nn.Module, str, Tensor]]  # base tensors that the file brings
    report: LoadReport


class AdapterPlanner:
    """Plans one adapter: its sites and its tensors, without touching the model.

    Args:
        finder: of the model that is to get the adapter.
        adapter: its name.
        tensors: values by their key in the file; None starts fresh.
        prefix: before the names of modules in the keys of `tensors`.
        strict: whether keys that do not fit raise, or only warn.
        autocast: keep the parameters in float32 if the base is in half precision.
        meta: make fresh tensors on the meta device.
    """

    def __init__(
        self,
        finder: SiteFinder,
        adapter: str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        prefix: str = PREFIX,
        strict: bool = True,
        autocast: bool = True,
        meta: bool = False,
    ) -> None:
        self.finder, self.root, self.adapter = finder, finder.root, adapter
        self.loader = None if tensors is None else Loader(tensors, strict)
        self.prefix, self.autocast, self.meta = prefix, autocast, meta

    def plan_adapter(self, config: Method) -> AttachPlan:
        """Return the adapter with its tensors.

        Raises:
            ValueError: targets that do not exist, or a hyper-parameter that does not fit a layer.
            AdapterLoadError: the file's tensors do not fit and loading is strict.
        """
        config = copy.deepcopy(config).prepare(self.root)
        self.prefix = prefix_of(config, self.prefix)
        planned: list[PlannedSite] = []
        shared: dict[str, Tensor] = {}
        parts = [config, *config.companions(self.root)]
        copied = {
            n
            for part in parts
            if part.acts_on == "copies"
            for n in part.sites_of(self.root, self.finder.sublayers_of) or ()
        }
        for part in parts:
            sites = self.finder.resolve_sites(part, planned, copied)
            shared |= self._init_shared(part, [p.site for p in sites])
            self._plan_config(part, sites)
            planned += sites
        overrides = {} if self.loader is None else self._resolve_leftover_keys(self.loader)
        report = LoadReport() if self.loader is None else self.loader.report
        return AttachPlan(self._with_resolved_targets(config, planned), planned, shared, overrides, report)

    def _plan_config(self, config: Method, sites: Sequence[PlannedSite]) -> None:
        """Make the tensors of one config at its sites."""
        loader, first = self.loader, None
        for planned in sites:
            if planned.copies_module:
                planned.whole = copy_module(planned, loader, self.prefix)
                continue
            if not planned.has_tensors:
                planned.entry.saved = False
                continue
            site, entry = planned.site, planned.entry
            home = site.home
            site.device = torch.device("meta") if loader is not None or self.meta else home
            site.dtype = parameter_dtype(site, self.autocast)
            fresh = entry.method.init(site) if loader is None else entry.method.loaded(site)
            if first is not None:  # all sites use the first one's tensors
                save = config.every_site_saves
                values = {k: first.values[attr_of(first, k, self.adapter)] for k in fresh}
                self._assign_tensors(planned, values, save=save)
                if save and loader is not None:
                    for key in fresh.keys() & entry.names.keys():
                        loader.left.pop(file_key(self.prefix, entry, key), None)
                continue
            if loader is not None:
                self._fill_from_file(planned, fresh, loader, home)
            if config.first_for_all:
                trained = {k for k in fresh if config.declared(k).trained}
                fresh = {k: nn.Parameter(t) if k in trained else t for k, t in fresh.items()}
                first = planned
            self._assign_tensors(planned, fresh)

    def _fill_from_file(self, place: PlannedSite, fresh: dict[str, Tensor], loader: Loader, home: torch.device) -> None:
        """Replace the shapes in `fresh` by the file's tensors."""
        site, entry = place.site, place.entry
        for key, shape in fresh.items():
            if key not in entry.names:
                continue
            wanted = file_key(self.prefix, entry, key)
            if wanted not in loader.left:
                path = wanted.removesuffix(entry.names[key])
                others = (path + name for name in entry.method.declared(key).reads)
                wanted = next((other for other in others if other in loader.left), wanted)
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

    def _assign_tensors(self, place: PlannedSite, fresh: Mapping[str, Tensor], *, save: bool = True) -> None:
        """Give a place its tensors under the attribute names they get on the layer."""
        entry, method = place.entry, place.entry.method
        attributes = {k: attr_of(place, k, self.adapter) for k in fresh}
        entry.trained = tuple((k, a) for k, a in attributes.items() if method.declared(k).trained)
        entry.frozen = tuple((k, a) for k, a in attributes.items() if not method.declared(k).trained)
        entry.shared = tuple(method.shared_tensors())
        entry.saved = save
        place.values = {attributes[k]: t for k, t in fresh.items()}

    def _init_shared(self, config: Method, sites: list[AdaptedSite]) -> dict[str, Tensor]:
        """Tensors shared between the sites: from the file where it has them, else drawn anew."""
        shared = config.shared_tensors()
        if not shared:
            return {}
        names = {key: one.shared_key for key, one in shared.items()}
        home = sites[0].home
        drawn: dict[str, Tensor] = {}
        if self.loader is not None:
            for key, name in names.items():
                found = self.loader.left.pop(f"base_model.{name}", self.loader.left.pop(name, None))
                if found is not None:
                    drawn[key] = found
            if len(drawn) == len(names):
                return {k: t.to(device=home) for k, t in drawn.items()}
            self.loader.report.missing += [
                f"base_model.{n}" for k, n in names.items() if k not in drawn and shared[k].saved_by(config)
            ]
        fresh = config.init_shared(sites)
        return {k: drawn.get(k, t).to(device="meta" if self.meta else home) for k, t in fresh.items()}

    def _resolve_leftover_keys(self, loader: Loader) -> dict[str, tuple[nn.Module, str, Tensor]]:
        """Deal with keys that found no place; return those that are base tensors, to be loaded as such."""
        overrides: dict[str, tuple[nn.Module, str, Tensor]] = {}
        head = getattr(self.root, "get_output_embeddings", lambda: None)()
        vocabulary = {id(head), *(id(m) for m in self.finder.modules.values() if isinstance(m, nn.Embedding))}
        for key in list(loader.left):
            name = key.removeprefix(self.prefix).removesuffix(".weight").removesuffix(".base_layer")
            module: nn.Module | None = self.finder.modules.get(name) if key.endswith(".weight") else None
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
                f"adapter {self.adapter!r} brings weights of the base model, which replace its own: {names}",
                stacklevel=2,
            )
        loader.report.unexpected = sorted(loader.left)
        if not loader.report.clean:
            text = (
                f"adapter {self.adapter!r} does not fit its file:\n  {loader.report.describe()}\n"
                f"Likely cause: {loader.report.cause()}."
            )
            if loader.strict:
                raise AdapterLoadError(text + " Pass strict=False to load what fits.", loader.report)
            warnings.warn(text, stacklevel=2)
        return overrides

    def _with_resolved_targets(self, config: Method, plan: Sequence[PlannedSite]) -> Method:
        """Fill in what the file has to say: resolved targets, copied modules, transposed layers."""
        mine = [p for p in plan if type(p.entry.method) is type(config)]
        if isinstance(config, TargetFields) and config.sites_of(self.root, self.finder.sublayers_of) is None:
            wanted = config.target_modules
            if wanted is None and (default := select.wanted_targets(self.root, config.target_query())[0]) is not None:
                config = config.replace(target_modules=default)
            elif isinstance(wanted, str) and wanted.lower() == select.ALL_LINEAR:
                names = [p.site.name for p in mine if p.is_layer]
                config = config.replace(target_modules=short_names(names, self.root))
        elif isinstance(config, TargetFields) and config.target_modules is None:
            config = config.replace(
                target_modules=defaults.default_targets(config.peft_name, defaults.model_type(self.root))
            )
        if isinstance(config, TransposedField):
            config.fan_in_fan_out = any(p.site.kind.name == "Conv1D" for p in mine)
        if isinstance(config, SavedModules) and (kept := [*chain(*config.copied_modules())]):
            config.modules_to_save = kept
        return config


def attr_of(place: PlannedSite, key: str, adapter: str) -> str:
    """Name of a tensor on its layer: peft's name below the module, then the adapter's, without dots."""
    stem = place.entry.names.get(key) or key
    stem = stem.removesuffix(".weight").replace(".", "_")
    owner = f":{place.site.param}" if place.site.kind.by_parameter else ""
    return f"{stem}{owner}:{adapter}"


def parameter_dtype(site: AdaptedSite, autocast: bool) -> torch.dtype:
    dtype = site.float_dtype
    return torch.float32 if autocast and dtype in HALF else dtype


def check_name(adapter: str, taken: Iterable[str]) -> None:
    """Raise ValueError for a name that exists or that a parameter, a path or a key cannot hold."""
    if not isinstance(adapter, str) or not adapter or any(c in adapter for c in "/\\.:") or adapter != adapter.strip():
        raise ValueError(f"adapter name {adapter!r}: must be a non-empty string without '/', '\\', '.' or ':'")
    if adapter == "__base__":
        raise ValueError("adapter name '__base__' is reserved for rows that use the base model")
    if adapter in taken:
        raise ValueError(f"adapter {adapter!r} exists already; delete it first or choose another name")


def short_names(names: Sequence[str], root: nn.Module) -> set[str]:
    """The fewest suffixes that name exactly `names`: last components where they are unambiguous."""
    wanted = set(names)
    leaves = {n.rpartition(".")[2] for n in names}
    clashing = {n.rpartition(".")[2] for n, m in root.named_modules() if n not in wanted and layers.is_supported(m)}
    short = {leaf for leaf in leaves - clashing if leaf and not leaf.isdigit()}
    return short | {n for n in wanted if n.rpartition(".")[2] not in short}
