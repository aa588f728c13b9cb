"""Removing adapters, and restoring the base model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from ..distributed import offload, torch_fastpath
from ..injection.class_swap import restore_class
from ..injection.dispatch import state_of
from ..injection.entries import AdaptedSite, copy_name
from ..injection.router import AdapterExpr, adapter_names
from .adapters import ATTRIBUTE, Runtime
from .attach import regroup_layers
from .merge import merge_for_good, unmerge_adapters


def delete_adapter(runtime: Runtime, adapter: str) -> None:
    """Remove an adapter; layers without any are given back as they were."""
    runtime.config_of(adapter)
    if adapter in adapter_names(runtime.router.merged):
        raise ValueError(f"adapter {adapter!r} is merged into the base weights; call unmerge_adapter() first")
    if needed := [n for n, c in runtime.configs.items() if adapter in c.uses]:
        raise ValueError(f"adapter {adapter!r} is used by {needed[0]!r}; delete that one first")
    sites = runtime.places.pop(adapter)
    for site in sites:
        entry = site.entries.pop(adapter)
        for _, attr in (*entry.trained, *entry.frozen):
            site.owner._parameters.pop(attr, None)
            site.owner._buffers.pop(attr, None)
            site.owner._non_persistent_buffers_set.discard(attr)
        layer = runtime.layers[site.name]
        layer._modules.pop(copy_name(adapter), None)
        if not site.entries:
            _detach_site(runtime, site)
    regroup_layers(runtime, sites)
    runtime.router.shared.drop(adapter)
    del runtime.configs[adapter]
    runtime.steps.pop(adapter, None)
    runtime.router.set(tuple(i for i in runtime.router.chosen if adapter not in adapter_names([i])))
    if not runtime.router.active and runtime.configs:
        runtime.router.set((next(iter(runtime.configs)),))
        warnings.warn(
            f"adapter {adapter!r} was the active one; {runtime.router.active[0]!r} is active now", stacklevel=3
        )


def _detach_site(runtime: Runtime, site: AdaptedSite) -> None:
    layer = runtime.layers.pop(site.name)
    del runtime.sites[site.name]
    state = state_of(layer)
    assert state is not None
    if site.role:
        from ..prompts import prompt_stack

        stack = state.find(prompt_stack.PromptStack)
        if stack is not None and stack.site is site:
            prompt_stack.detach_stack(stack)
            prompt_stack.link_encoder(runtime.sites.values())
    state.release(site)
    if site.spot is not None and site.spot.residual:
        residual = runtime.root.get_submodule(site.spot.residual)
        tapped = state_of(residual)
        if tapped is not None and residual is not layer:
            tapped.release(site)
            if not tapped.in_use:
                restore_class(residual)
    if not state.in_use:
        restore_class(layer)
        offload.release_residents(layer)


def unload_adapters(runtime: Runtime, *, merge: Sequence[AdapterExpr] | None = None, check: bool = False) -> nn.Module:
    """Take every adapter off and return the base model, with `merge` baked in for good."""
    for release in list(runtime.on_unload):
        release()
    if merge is None:
        unmerge_adapters(runtime)
    else:
        merge_for_good(runtime, merge, check)
    for adapter in list(runtime.configs):
        for site in list(runtime.places[adapter]):
            if site.kind.whole and merge and adapter in adapter_names(merge):
                _replace_module(runtime, site.key, runtime.layers[site.name]._modules[copy_name(adapter)])  # type: ignore[arg-type]
    runtime.router.set((), merged=())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in reversed(list(runtime.configs)):  # those that use others came later
            delete_adapter(runtime, adapter)
    runtime.root._modules.pop("veneer_shared", None)
    torch_fastpath.restore_fastpath(runtime.root)
    runtime.root.__dict__.pop(ATTRIBUTE, None)
    return runtime.root


def _replace_module(runtime: Runtime, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    runtime.root.get_submodule(parent)._modules[leaf] = module
