"""Attach, switch, merge, delete: the life of adapters on one model. Knows no method by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..injection.entries import AdaptedSite, copy_name
from ..injection.router import AdapterExpr, CombinedExpr, Router, adapter_names, as_stack
from ..io import fingerprint
from ..methods.base import Method
from ..targets import suggest
from ..targets.blocks import SublayerOutput
from .find_sites import SiteFinder
from .keys import PREFIX, file_key, prefix_of
from .plan import AdapterPlanner

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
        on_unload: called before the base model is restored, to release what else was put on it.
        on_read: called before an adapter's tensors are read to be saved, to finish what a step began.
        steps: adapter name -> how many steps of an optimizer its method has acted on, (); of methods with `step`.
        base: fingerprint of the base model from before anything was attached, or None.
    """

    def __init__(self, root: nn.Module) -> None:
        from ..kernels.plan import KernelPlanner  # the first adapter pays for importing the kernels

        self.root = root
        self.router = Router()
        self.router.runtime = weakref.ref(self)
        self.router.planner = KernelPlanner()
        self.configs: dict[str, Method] = {}
        self.sites: dict[str, AdaptedSite] = {}
        self.layers: dict[str, nn.Module] = {}  # site name -> the layer taken over for it
        self.places: dict[str, list[AdaptedSite]] = {}
        self.on_unload: list[Callable[[], None]] = []  # called before the base model is restored
        self.on_read: list[Callable[[], None]] = []
        self.steps: dict[str, Tensor] = {}
        self.base: fingerprint.Fingerprint | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.router.runtime = weakref.ref(self)

    @classmethod
    def ensure(cls, root: nn.Module) -> Runtime:
        found = runtime_of(root)
        return found if found is not None else cls(root)

    def planner(self, adapter: str, modules: Mapping[str, nn.Module] | None = None, **options: Any) -> AdapterPlanner:
        """A planner of a new adapter; `options` are those of `AdapterPlanner`."""
        modules = dict(self.root.named_modules()) if modules is None else modules
        finder = SiteFinder(self.root, self.router, self.sites, modules, self.sublayers_of)
        return AdapterPlanner(finder, adapter, **options)

    def sublayers_of(self, adapter: str) -> dict[str, tuple[SublayerOutput, Method]]:
        """Sub-layers whose outputs an adapter maps: name -> the place, and its method there."""
        self.config_of(adapter)
        return {s.key: (s.spot, s.entries[adapter].method) for s in self.places[adapter] if s.spot is not None}

    def known_base(self) -> fingerprint.Fingerprint:
        """The base model's fingerprint; of a skeleton it is taken again when there are values."""
        if self.base is None or not self.base.weights:
            self.base = fingerprint.fingerprint_of(self.root)
        return self.base

    def note_tokenizer(self, tokenizer: object) -> None:
        """Let the fingerprint that is saved with adapters say which tokenizer they are for."""
        self.base = replace(self.known_base(), tokenizer=fingerprint.of_tokenizer(tokenizer))

    # Looking.

    def named_tensors(self, adapter: str, prefix: str = PREFIX) -> Iterator[tuple[str, Tensor]]:
        """The adapter's saved tensors with their keys in the file."""
        for finish in self.on_read:
            finish()
        config = self.config_of(adapter)
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
                p = site.tensors(adapter)
                for key, _ in (*entry.trained, *entry.frozen):
                    if key in entry.names and entry.method.declared(key).saved_by(entry.method):
                        yield file_key(prefix, entry, key), p[key]
        for key, one in config.shared_tensors().items():
            if one.saved_by(config):
                yield ("base_model." if prefix else "") + one.shared_key, self.router.shared.get(adapter, key)

    def steps_of(self, adapter: str) -> Tensor:
        """How many steps of an optimizer an adapter's method has acted on, ()."""
        return self.steps.setdefault(adapter, torch.zeros((), dtype=torch.long))

    def computes_its_file(self, adapter: str) -> bool:
        """Whether what is saved is computed from what is trained."""
        for site in self.places[adapter]:
            entry = site.entries[adapter]
            if not site.kind.whole and entry.saved and entry.method.exported(site.tensors(adapter), site) is not None:
                return True
        return False

    def training_state(self, adapter: str) -> dict[str, Tensor]:
        """What is trained, the live Parameters, by the adapter's own names; a checkpoint needs it to go on."""
        for finish in self.on_read:
            finish()
        found: dict[str, Tensor] = {}
        if "step" in self.config_of(adapter).training_hooks:
            found["|steps"] = self.steps_of(adapter)
        for site in self.places[adapter]:
            entry = site.entries[adapter]
            if site.kind.whole:
                copied = self.layers[site.name]._modules[copy_name(adapter)]
                assert copied is not None
                found |= {f"{entry.key}.{n}": t for n, t in copied.state_dict(keep_vars=True).items()}
            elif entry.saved:
                found |= {f"{site.key}|{k}": p for k, p in site.parameters(adapter).items()}
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
                found = [*site.parameters(adapter).values()]
            for parameter in found:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    def config_of(self, adapter: str) -> Method:
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
                self.config_of(name)
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
                if self.configs[name].acts_on in ("stacks", "copies"):
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
