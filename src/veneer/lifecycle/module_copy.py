"""Full copies of modules, for `modules_to_save`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import layers
from ..backends import backend_of, bare_of
from ..distributed import offload, sharding, tensor_parallel
from ..layers.shallow_copy import shallow_copy
from .find_sites import PlannedSite

if TYPE_CHECKING:
    from .load_report import Loader


def copy_module(place: PlannedSite, loader: Loader | None, prefix: str) -> nn.Module:
    """A deep copy of a module without anything of ours on it, filled from the file if there is one."""
    module = place.layer
    _refuse_packed(module, place.site.name)
    if any(tensor_parallel.style_of(m) is not None for m in module.modules()):
        raise ValueError(
            f"{place.site.name}: tensor parallelism splits it between the processes, and a copy that is trained whole "
            "(modules_to_save) is not supported there; name it in target_modules, or load the model without tp_plan"
        )
    double = shallow_copy(module)
    double.__dict__["_buffers"] = dict(double._buffers)
    for table in (double._parameters, double._modules, double._buffers):
        for name in [n for n in table if ":" in n]:
            del table[name]
    for name, parameter in double._parameters.items():
        if parameter is not None and parameter.device.type == "meta":
            found = offload.fetch_offloaded(module, name)
            if found is not None:
                device = offload.execution_device(module)
                double._parameters[name] = nn.Parameter(found.to(device, copy=True), requires_grad=False)
    # A copy begins as an ordinary parameter also where ZeRO-3 partitions what it is of.
    put_away = {id(p): nn.Parameter(sharding.gathered_value(p).detach().clone(), p.requires_grad) for p in double.parameters()
                if sharding.is_partitioned(p)}  # fmt: skip
    copied = copy.deepcopy(double, put_away)
    if loader is not None:
        for name, value in copied.state_dict().items():
            found = loader.take(f"{prefix}{place.entry.key}.{name}", value.shape)
            if found is not None:
                with torch.no_grad():
                    value.copy_(found)
    return copied


def _refuse_packed(module: nn.Module, name: str) -> None:
    """Raise ValueError where a module that is to be trained whole has quantized weights in it."""
    for below, layer in module.named_modules():
        kind = layers.kind_of(layer)
        param = next(iter(bare_of(layer)), None) if kind is None else kind.weight_of(layer)
        if param is None:
            continue
        backend = backend_of(layer, param, name)
        if backend.packed:
            raise ValueError(
                f"modules_to_save: {'.'.join(filter(None, (name, below)))!r} is stored as {backend.name}, and a copy of it "
                "cannot be trained; leave it unquantized when loading the base model, or name it in target_modules"
            )
