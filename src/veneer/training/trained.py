"""What is trained in a model and what is frozen, as the watch compares them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed.sharding import is_sharded
from ..injection.entries import copy_name
from ..lifecycle.adapters import runtime_of
from .optimizers import by_deepspeed

NAMED = 3  # parameters that a message names
SAMPLED = 16  # entries of each frozen weight that are compared


@dataclass(eq=False)
class TrainedParameter:
    """A trained parameter, and whose it is."""

    name: str
    parameter: nn.Parameter
    adapter: str | None = None  # None for one that is no adapter's
    layer: nn.Module | None = None  # whose forward uses it; None where that is not known
    site: str = ""
    lookup: bool = False  # only rows of what comes in get a gradient

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of it, and no hook on it says what happens."""
        return is_sharded(self.parameter)

    @property
    def taken(self) -> bool:
        """Whether its gradient and its updates are elsewhere than with it."""
        return self.sharded or by_deepspeed(self.parameter)


def list_trained(model: nn.Module) -> list[TrainedParameter]:
    """What is trained, in the model's order."""
    whose: dict[int, tuple[str, nn.Module | None, str, bool]] = {}
    for root in model.modules():
        runtime = runtime_of(root)
        if runtime is None:
            continue
        for adapter, sites in runtime.places.items():
            for site in sites:
                layer = runtime.layers[site.name]
                if site.kind.whole:
                    copied = layer._modules[copy_name(adapter)]
                    parts = [] if copied is None else list(copied.parameters())
                else:
                    parts = [*site.parameters(adapter).values()]
                lookup = isinstance(layer, nn.Embedding) or site.lookup
                for part in parts:
                    whose.setdefault(id(part), (adapter, layer, site.name, lookup))
            for part in runtime.router.shared.trained(adapter):
                whose[id(part)] = (adapter, None, "", False)
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.append(TrainedParameter(name, parameter, *whose.get(id(parameter), ())))
    return found


def is_inside(root: nn.Module, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in root.parameters())


def sample_frozen(root: nn.Module) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Some entries of each frozen weight of a base model, and of the statistics of its frozen batch norms."""
    found: list[tuple[str, Tensor]] = []
    for name, p in root.named_parameters():
        plain = type(p) is nn.Parameter and type(p.data) is Tensor and not is_sharded(p) and not by_deepspeed(p)
        if plain and ":" not in name and not p.requires_grad and p.device.type != "meta" and p.numel():
            found.append((name, p))
    for name, module in root.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and ":" not in name:
            if not any(p.requires_grad for p in module.parameters()):
                found.append((f"{name}.running_mean", module.running_mean))
    taken = []
    for name, tensor in found:
        where = spread_positions(tensor.numel(), tensor.device)
        taken.append((name, tensor, where, torch.take(tensor.detach(), where)))
    return taken


def spread_positions(size: int, device: torch.device | None = None) -> Tensor:
    """Positions of some entries from the first to the last of `size`, in whole numbers: float32 cannot count so far."""
    count = min(SAMPLED, size)
    return torch.arange(count, device=device) * (size - 1) // max(count - 1, 1)


def sample_updates(trained: Iterable[TrainedParameter]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Of each parameter with a gradient: where that is largest, the value and the gradient there."""
    found = {}
    for one in trained:
        p, gradient = one.parameter, one.parameter.grad
        if gradient is None or one.taken or not p.numel():
            continue
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        where = gradient.detach().abs().argmax()
        found[id(p)] = where, torch.take(p.detach(), where), torch.take(gradient.detach(), where)
    return found


def find_largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude in each tensor; NaN where there is one."""
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    found = [t.abs().max().float() if t.numel() else torch.zeros(()) for t in dense]
    return [float(v) for v in found]


def is_checkpointed(model: nn.Module) -> bool:
    return any(m.__dict__.get("gradient_checkpointing") is True for m in model.modules())


def sort_like(some: Iterable[TrainedParameter], every: Sequence[TrainedParameter]) -> list[TrainedParameter]:
    keys = {id(t.parameter) for t in some}
    return [t for t in every if id(t.parameter) in keys]


def show_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def show_trained(some: Sequence[TrainedParameter]) -> str:
    return show_first([t.name for t in some])


def show_first(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model within a facade or a wrapper."""
    while True:
        inner = model.__dict__.get("_modules", {})
        if "_orig_mod" in inner or type(model).__name__ in (
            "DistributedDataParallel",
            "DataParallel",
            "DeepSpeedEngine",
        ):
            model = inner["_orig_mod"] if "_orig_mod" in inner else inner["module"]
        elif "_runtime" in model.__dict__:
            model = model.__dict__["_runtime"].root
        else:
            return model
