"""Weighted combinations of adapters, as new adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import sharding
from ..injection.entries import copy_name
from .adapters import Runtime
from .attach import attach_adapter
from .keys import PREFIX, file_key
from .plan import check_name


def combine_adapters(
    runtime: Runtime, adapters: Sequence[str], weights: Sequence[float], name: str, **options: object
) -> None:
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
    check_name(name, runtime.configs)
    configs = [runtime.config_of(a) for a in adapters]
    if not configs or len(configs) != len(weights):
        raise ValueError(
            f"{len(configs)} adapters and {len(weights)} weights; give one or more adapters, and a weight for each"
        )
    if len({type(c) for c in configs}) > 1:
        kinds = ", ".join(f"{a!r} is {c.peft_name}" for a, c in zip(adapters, configs, strict=True))
        raise ValueError(f"only adapters of one method can be combined ({kinds}); stack them with set_adapter")
    config = configs[0].combined(configs[1:], **options)
    places = {p.site.name: p for p in runtime.planner(name, meta=True).plan_adapter(config).sites}
    tensors: dict[str, Tensor] = {}
    for site in runtime.sites.values():
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
            copied = runtime.layers[site.name]._modules[copy_name(there[0][0])]
            tensors |= {f"{PREFIX}{place.entry.key}.{k}": v for k, v in copied.state_dict().items()}  # type: ignore[union-attr]
            continue
        if not site.entries[there[0][0]].saved:  # it follows another site
            continue
        with torch.no_grad(), sharding.gathered_in_place(site.owner._parameters.values()):
            parts = [(site.entries[a].method, site.tensors(a)) for a, _ in there]
            made = place.entry.method.combine(parts, [w for _, w in there], site)
        tensors |= {file_key(PREFIX, place.entry, k): v for k, v in made.items()}
    attach_adapter(runtime, name, config, tensors=tensors, trainable=False)
