"""An adapter's planned sites and tensors, before the model is touched."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import layers
from ..backends import backend_of, bare_of
from ..distributed import offload, sharding, tensor_parallel
from ..injection.entries import AdapterAtSite
from ..layers.shallow_copy import shallow_copy
from ..layers.site import Site
from ..methods.base import Method
from ..prompts.prompt_stack import PromptStack
from .keys import HALF

if TYPE_CHECKING:
    from .load_report import Loader, LoadReport


@dataclass
class PlannedSite:
    """A site about to receive an adapter: planned first, committed once nothing can fail any more."""

    site: Site
    layer: nn.Module  # the module whose forward is taken over
    role: str  # "main", "bare", "module", "door", "objective" or "opaque"
    entry: AdapterAtSite
    values: dict[str, Tensor] = field(default_factory=dict)  # attribute -> parameter or buffer
    whole: nn.Module | None = None  # a full copy
    door: PromptStack | None = None


@dataclass
class AttachPlan:
    """An adapter that was planned and not yet put into the model."""

    config: Method
    places: list[PlannedSite]
    shared: dict[str, Tensor]
    overrides: dict[str, tuple[nn.Module, str, Tensor]]  # base tensors that the file brings
    report: LoadReport


def copy_module(place: PlannedSite, loader: Loader | None, prefix: str) -> nn.Module:
    """A deep copy of a module without anything of ours on it, filled from the file if there is one."""
    module = place.layer
    refuse_packed(module, place.site.name)
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
            found = offload.fetch(module, name)
            if found is not None:
                device = offload.execution_device(module)
                double._parameters[name] = nn.Parameter(found.to(device, copy=True), requires_grad=False)
    # A copy begins as an ordinary parameter also where ZeRO-3 partitions what it is of.
    put_away = {id(p): nn.Parameter(sharding.value(p).detach().clone(), p.requires_grad) for p in double.parameters()
                if sharding.is_partitioned(p)}  # fmt: skip
    copied = copy.deepcopy(double, put_away)
    if loader is not None:
        for name, value in copied.state_dict().items():
            found = loader.take(f"{prefix}{place.entry.key}.{name}", value.shape)
            if found is not None:
                with torch.no_grad():
                    value.copy_(found)
    return copied


def refuse_packed(module: nn.Module, name: str) -> None:
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


def attr_of(place: PlannedSite, key: str, adapter: str) -> str:
    """Name of a tensor on its layer: peft's name below the module, then the adapter's, without dots."""
    stem = place.entry.names.get(key) or key
    stem = stem.removesuffix(".weight").replace(".", "_")
    owner = f":{place.site.param}" if place.site.kind.by_parameter else ""
    return f"{stem}{owner}:{adapter}"


def parameter_dtype(site: Site, autocast: bool) -> torch.dtype:
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
    clashing = {n.rpartition(".")[2] for n, m in root.named_modules() if n not in wanted and layers.supported(m)}
    short = {leaf for leaf in leaves - clashing if leaf and not leaf.isdigit()}
    return short | {n for n in wanted if n.rpartition(".")[2] not in short}
