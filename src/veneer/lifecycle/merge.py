"""Merging adapters into one site's weight, and restoring its bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.recursion import walk_terms
from ..backends.plain import PLAIN
from ..injection.router import AdapterExpr
from ..layers.site import MergeBackup, Site


def merge_site(site: Site, names: tuple[AdapterExpr, ...], uses: Mapping[int, int], check: bool) -> None:
    """Write the effective weight and bias of one site, remembering what was there."""
    with torch.no_grad():
        stored, bias = site.stored(), site.bias
        wide = torch.promote_types(stored.dtype, torch.float32)
        links = site.links(names)
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


def restore(site: Site) -> None:
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
