"""Merging adapters into one site's weight, and restoring its bits."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.recursion import walk_terms
from ..backends.plain import PLAIN
from ..distributed import sharding, tensor_parallel
from ..injection.entries import AdaptedSite
from ..injection.router import AdapterExpr, adapter_names
from ..layers.site import MergeBackup
from .adapters import Runtime


def merge_site(site: AdaptedSite, names: tuple[AdapterExpr, ...], uses: Mapping[int, int], check: bool) -> None:
    """Write the effective weight and bias of one site, remembering what was there."""
    with torch.no_grad():
        stored, bias = site.stored(), site.bias
        wide = torch.promote_types(stored.dtype, torch.float32)
        links = site.terms(names)
        weight, new_bias = site.kind.compose(
            site, links, site.kind.canonical(site, stored).to(wide), None if bias is None else bias.to(wide)
        )
        value = site.kind.restored(site, weight).contiguous()
        if check and not (value.isfinite().all() and (new_bias is None or new_bias.isfinite().all())):
            raise ValueError(
                f"{site.name}: merging {list(names)} gives weights that are not finite; the adapter is broken. "
                "Nothing was merged"
            )
        groups = site.kind.widen(site, value)
        backend = site.backend
        original = MergeBackup(None if backend.packed else stored, bias, None, groups=site.groups)
        parameter = backend.storage(site.owner, site.param)
        if not any(changes_weight(link) for link in walk_terms(links)):
            pass  # what is stored stays as it is, tied, quantized or not
        elif backend.packed and not backend.can_write(site.owner, site.param):
            raise ValueError(
                f"{site.name}: merging {list(names)} would have to write {type(site.owner).__name__}.{site.param}, and "
                f"weights stored as {backend.name} cannot be written here; keep the adapter unmerged, or merge it into the "
                "dequantized weights with merge_and_unload(dequantize=True) or export_dense. Nothing was merged"
            )
        elif uses[id(parameter)] > 1 and isinstance(parameter, nn.Parameter) and not backend.packed:
            warnings.warn(
                f"{site.name}: its weight is tied to another module's; merging gives this module a weight of its own "
                "and leaves the other as it was",
                stacklevel=4,
            )
            original.parameter = parameter
            site.owner._parameters[site.param] = nn.Parameter(value.to(stored.dtype), requires_grad=False)
        else:
            original.token = backend.write(site.owner, site.param, value)
        if not backend.packed and isinstance(original.token, Tensor):
            original.weight = original.token
        if bias is not None and new_bias is not None and any(changes_bias(link) for link in walk_terms(links)):
            original.bias_token = PLAIN.write(site.owner, site.kind.bias, new_bias)
            if isinstance(original.bias_token, Tensor):
                original.bias = original.bias_token
        if groups != site.groups:
            site.owner.__dict__["groups"] = groups
        site.original = original


def changes_weight(link: Any) -> bool:
    return link.delta is not None or link.left is not None or link.right is not None


def changes_bias(link: Any) -> bool:
    return link.shift is not None or (link.left is not None and link.left.scales_bias)


def restore_weight(site: AdaptedSite) -> None:
    """Undo `merge_site`: the same storage, hence the same bits."""
    original = site.original
    assert original is not None
    if original.parameter is not None:
        site.owner._parameters[site.param] = original.parameter
    elif original.token is not None:
        site.backend.restore(site.owner, site.param, original.token)
    if original.bias_token is not None:
        PLAIN.restore(site.owner, site.kind.bias, original.bias_token)
    if site.groups > 1:
        site.owner.__dict__["groups"] = original.groups
    site.original = None


def merge_adapters(runtime: Runtime, names: Sequence[AdapterExpr], *, check: bool = False, keep: bool = True) -> None:
    """Bake adapters into the base weights, computed in float32 and rounded once.

    Args:
        names: in the order in which they are stacked.
        check: raise, with everything as before, if a merged weight is not finite.
        keep: remember the base weights for `unmerge`.

    Raises:
        ValueError: an adapter cannot be expressed as a weight, or a weight would not be finite.
    """
    for name in adapter_names(names):
        runtime.config_of(name)
    already = runtime.router.merged
    wanted = (*already, *(n for n in names if n not in already))
    if wanted == already:
        warnings.warn("all of these adapters are merged already; nothing to do", stacklevel=3)
        return
    sites = [
        s for s in runtime.sites.values() if not s.kind.whole and any(n in s.entries for n in adapter_names(wanted))
    ]
    for site in sites:
        if site.backend is None:
            name = next(n for n in adapter_names(wanted) if n in site.entries)
            raise ValueError(
                f"{site.name}: adapter {name!r} ({runtime.configs[name].peft_name}) acts on activations and cannot be "
                "merged into weights; keep it unmerged, or name the adapters to merge in adapter_names"
            )
    done: list[AdaptedSite] = []
    uses = _parameter_uses(runtime)
    try:
        for site in sites:
            if site.original is not None:
                restore_weight(site)
            with (
                sharding.gathered_in_place(site.owner._parameters.values(), change=True),
                tensor_parallel.replicate_plain(),
            ):
                merge_site(site, wanted, uses, check)
            done.append(site)
            if not keep:
                site.original = None
    except BaseException:
        for site in done:
            if site.original is not None:
                restore_weight(site)
        if already:
            runtime.router.set(merged=())
            merge_adapters(runtime, already)
        raise
    runtime.router.set(merged=wanted)


def _parameter_uses(runtime: Runtime) -> Counter[int]:
    """How many modules have each parameter, by its id."""
    return Counter(id(p) for m in runtime.root.modules() for p in m._parameters.values() if p is not None)


def merge_again(runtime: Runtime, site: AdaptedSite) -> None:
    """Merge anew at one site, after what is merged there was changed."""
    restore_weight(site)
    merge_site(site, runtime.router.merged, _parameter_uses(runtime), False)


def unmerge_adapters(runtime: Runtime) -> None:
    """Put the exact bits of the base weights back."""
    for site in runtime.sites.values():
        if site.original is not None:
            restore_weight(site)
    runtime.router.set(merged=())


def merge_for_good(runtime: Runtime, names: Sequence[AdapterExpr], check: bool) -> None:
    missing = [n for n in names if n not in runtime.router.merged]
    if missing:
        merge_adapters(runtime, names, check=check)
    tied = [s for s in runtime.sites.values() if s.original is not None and s.original.parameter is not None]
    config = getattr(runtime.root, "config", None)
    if tied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    for site in runtime.sites.values():
        site.original = None
