"""Other values in a live LoRA adapter, in place: nothing that a compiled model depends on changes.

The new adapter's scale goes into its B, since the live one's is a constant of the compiled forward.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import adapter_files
from ..injection.entries import AdaptedSite, AdapterAtSite, copy_name
from ..injection.router import adapter_names
from ..io import locate
from ..lifecycle.adapters import Runtime
from ..lifecycle.keys import PREFIX, file_key, prefix_of
from ..methods.base import Method, PeftConfig
from ..methods.lora import LoraConfig

ALIKE = ("use_dora", "lora_bias", "lora_dropout")  # what a swap leaves as it is, and must therefore be the same
CHECKS = ("error", "warn", "ignore")
AXES = {"A": 0, "B": 1}  # where the rank is in A (r, in, ...) and B (out, r, ...)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Fill the LoRA adapters of a model up with zeros to a rank, so that others of up to that rank can be swapped in.

    Call it before compiling. The adapters' outputs and scales stay as they are, and their configs say the new rank.

    Args:
        model: with adapters on it.
        target_rank: the largest rank that will come; None leaves the ranks as they are.
        config: configs of the user's own in which r and rank_pattern become `target_rank`.
        check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: a compiled model; no LoRA adapter; a rank above `target_rank`; a layer whose rank cannot grow; an
            unknown `check_compiled`.
    """
    if check_compiled not in CHECKS:
        raise ValueError(f"check_compiled={check_compiled!r}: must be one of {', '.join(map(repr, CHECKS))}")
    if is_compiled(model):
        text = (
            "prepare_model_for_compiled_hotswap: the model is compiled already, and would be once more; call it before"
        )
        if check_compiled == "error":
            raise ValueError(f"{text}, or pass check_compiled='ignore'")
        if check_compiled == "warn":
            warnings.warn(text, stacklevel=2)
    runtime = adapter_files.runtime_on(unwrap_key(model))
    names = [n for n, c in runtime.configs.items() if isinstance(c, LoraConfig)]
    if not names:
        raise ValueError("the model has no LoRA adapter; attach or load the first one before preparing for others")
    if target_rank is None:
        return
    for name in names:
        grow_rank(runtime, name, target_rank)
    for own in config.values() if isinstance(config, Mapping) else () if config is None else (config,):
        own.r = target_rank
        own.rank_pattern = dict.fromkeys(own.rank_pattern or {}, target_rank)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace the values of a live LoRA adapter by those of a saved one, in place.

    The name, `requires_grad`, the optimizer's references and a compiled forward stay valid. Layers that the new adapter
    does not have are set to zero. Where its rank is larger, the live one grows, unless the model is compiled.

    Args:
        model: with the adapter on it, compiled or not.
        model_name_or_path: folder or hub id of the new one.
        adapter_name: name of the live one.
        torch_device: device on which the file is read.
        **kwargs: `config`, and `subfolder`, `revision`, `token`, `cache_dir` of the hub.

    Raises:
        ValueError: no such adapter; it is merged; another method, or options that a swap cannot change; a rank that does
            not fit.
        RuntimeError: the file has values for layers that the live adapter lacks. Nothing was changed.
    """
    compiled = is_compiled(model)
    runtime = adapter_files.runtime_on(unwrap_key(model))
    config = kwargs.pop("config", None)
    if config is None:
        config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    tensors = locate.load_weights(model_name_or_path, device=torch_device, **kwargs)
    swap_values(runtime, adapter_name, config, tensors, compiled=compiled)


def swap_values(
    runtime: Runtime, adapter: str, config: Method, tensors: Mapping[str, Tensor], *, compiled: bool = False
) -> None:
    """Copy an adapter's tensors, by their key in the file, into a live one; see `hotswap_adapter`."""
    live = runtime.config_of(adapter)
    if adapter in adapter_names(runtime.router.merged):
        raise ValueError(f"adapter {adapter!r} is merged into the base weights; call unmerge_adapter() first")
    if not isinstance(live, LoraConfig) or not isinstance(config, LoraConfig):
        raise ValueError(
            f"adapter {adapter!r} is {live.peft_name} and the new one {config.peft_name}; only LoRA can be swapped in place: "
            "delete the adapter and load the other one"
        )
    for field in ALIKE:
        if getattr(live, field) != getattr(config, field):
            raise ValueError(
                f"adapter {adapter!r}: {field} is {getattr(live, field)!r} here and {getattr(config, field)!r} in the new "
                "one, which a swap cannot change; delete the adapter and load the other one"
            )
    left = dict(tensors)
    places = lora_places(runtime, adapter)
    prefix = prefix_of(config, PREFIX)
    values: list[tuple[AdaptedSite, AdapterAtSite, str, Tensor | None]] = []
    largest = 0
    for site, entry in places:
        if entry.frozen:
            raise ValueError(
                f"{site.name}: adapter {adapter!r} started from the base weight, of which it keeps a share; delete it and "
                "load the other one"
            )
        scale = config.at(site.name).scale / lora_at(entry).scale
        for key, attr in entry.trained:
            value = left.pop(file_key(prefix, entry, key), None)
            if value is None and key not in AXES:
                raise RuntimeError(
                    f"{site.name}: the new adapter has no {entry.names[key]}, which adapter {adapter!r} has"
                )
            if value is not None:
                room = held_tensor(site, attr)
                if not values_fit(value, room, AXES.get(key), grows=can_grow(site)):
                    raise ValueError(
                        f"{site.name}: {entry.names[key]} of the new adapter is {tuple(value.shape)}, and there is room for "
                        f"{tuple(room.shape)}"
                    )
                if key in AXES:
                    largest = max(largest, value.shape[AXES[key]] if can_grow(site) else 0)
                if key in ("B", "B_bias") and scale != 1:
                    value = value.float() * scale
            values.append((site, entry, key, value))
    copies: list[tuple[Tensor, Tensor]] = []
    for site in runtime.places[adapter]:
        if site.kind.whole:
            whole = runtime.layers[site.name]._modules[copy_name(adapter)]
            assert whole is not None
            for name, own in whole.state_dict().items():
                value = left.pop(f"{prefix}{site.entries[adapter].key}.{name}", None)
                if value is None or value.shape != own.shape:
                    raise RuntimeError(
                        f"{site.key}.{name}: the new adapter brings no copy of it of shape {tuple(own.shape)}"
                    )
                copies.append((own, value))
    if left:
        shown = ", ".join(sorted(left)[:4])
        raise RuntimeError(
            f"{len(left)} tensors of the new adapter have no place in adapter {adapter!r}: {shown}; a swap can only fill "
            "layers that the live adapter has"
        )
    rank = max((held_tensor(s, dict(e.trained)["A"]).shape[0] for s, e in places if can_grow(s)), default=0)
    if largest > rank:
        if compiled:
            raise ValueError(
                f"the new adapter's rank is {largest}, and adapter {adapter!r} has room for {rank} in a compiled model; call "
                f"prepare_model_for_compiled_hotswap(model, target_rank={largest}) before compiling"
            )
        grow_rank(runtime, adapter, largest)
    with torch.no_grad():
        for site, entry, key, value in values:
            put_value(held_tensor(site, dict(entry.trained)[key]), value, AXES.get(key, 0))
        for own, copied in copies:
            own.copy_(copied)


def put_value(room: Tensor, value: Tensor | None, axis: int) -> None:
    """Fill a parameter with a tensor and, on one axis, with zeros behind it; with zeros alone for None."""
    if value is None:
        room.zero_()
        return
    n = value.shape[axis]
    room.narrow(axis, 0, n).copy_(value)
    room.narrow(axis, n, room.shape[axis] - n).zero_()


def values_fit(value: Tensor, room: Tensor, axis: int | None, *, grows: bool) -> bool:
    """Whether a tensor has the shape of a parameter, but for the rank."""
    if value.ndim != room.ndim:
        return False
    pairs = zip(value.shape, room.shape, strict=True)
    return all(a == b or (grows and i == axis) for i, (a, b) in enumerate(pairs))


def grow_rank(runtime: Runtime, adapter: str, rank: int) -> None:
    """Fill an adapter up with zeros to a rank; its config says the new one, with the same scale at every layer."""
    config: Any = runtime.configs[adapter]
    places = lora_places(runtime, adapter)
    for site, entry in places:
        r = lora_at(entry).r
        if r > rank or (r < rank and not can_grow(site)):
            why = (
                f"above target_rank={rank}" if r > rank else "and cannot grow in this layer: its rank is tied to groups"
            )
            raise ValueError(f"{site.name}: adapter {adapter!r} has rank {r} there, {why}")
    alphas = {site.name: alpha_for(lora_at(entry), rank) for site, entry in places}
    common = alpha_for(config, rank)
    grown = config.replace(
        r=rank,
        rank_pattern={},
        lora_alpha=common,
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != common},
    )
    for site, entry in places:
        for key, attr in entry.trained:
            parameter = held_tensor(site, attr)
            if key in AXES and parameter.shape[AXES[key]] != rank:
                axis = AXES[key]
                spare = [0, 0] * (parameter.ndim - 1 - axis) + [0, rank - parameter.shape[axis]]
                parameter.data = F.pad(parameter.data, spare)
        entry.method = grown.at(site.name)
    runtime.configs[adapter] = grown
    runtime.router.changed()


def lora_at(entry: AdapterAtSite) -> LoraConfig:
    """The method of a LoRA's share of a site, which `lora_places` found."""
    assert isinstance(entry.method, LoraConfig)
    return entry.method


def alpha_for(method: LoraConfig, rank: int) -> float:
    """The alpha that keeps a method's scale at another rank."""
    if method.r == rank:
        return method.lora_alpha
    return method.lora_alpha * (math.sqrt(rank / method.r) if method.use_rslora else rank / method.r)


def held_tensor(site: AdaptedSite, attribute: str) -> nn.Parameter:
    """A trained tensor of an adapter on its layer."""
    found = site.owner._parameters[attribute]
    assert found is not None
    return found


def can_grow(site: AdaptedSite) -> bool:
    return not site.experts and site.groups == 1


def lora_places(runtime: Runtime, adapter: str) -> list[tuple[AdaptedSite, AdapterAtSite]]:
    """Where an adapter has a LoRA of its own, rather than a full copy or trained rows."""
    found = [(site, site.entries[adapter]) for site in runtime.places[adapter]]
    return [(site, entry) for site, entry in found if isinstance(entry.method, LoraConfig)]


def is_compiled(model: nn.Module) -> bool:
    return "_orig_mod" in model._modules or getattr(model, "_compiled_call_impl", None) is not None


def unwrap_key(model: nn.Module) -> nn.Module:
    """A compiled model's own module."""
    found = model._modules.get("_orig_mod")
    return model if found is None else found
