"""Tensor parallelism of transformers (`from_pretrained(..., tp_plan="auto")`): adapters inside layers that are split.

Such a layer holds DTensors, and an instance-level `forward` around its own brings the input into the layout that the
layer wants and the output into the one that the model wants. Adapters run in between, on input, weight and output
as DTensors: an operator's products are sharded as the layer's are, and partial sums are reduced by DTensor's own
rules, in the backward too. Nothing here imports transformers: a layer is known by the closure of its forward.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..algebra.protocols import TensorTypes, TorchFunction
from . import sharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

KEYS = ("k_proj", "qkv_proj", "query_key_value")  # projections whose output has the keys' heads


class ParallelStyle(Protocol):
    """transformers' way of splitting one kind of layer."""

    def install_forward(self, module: nn.Module, mesh: object) -> None: ...


Split = tuple[ParallelStyle, object]  # how a layer is split, and the mesh of processes


def style_of(module: nn.Module) -> Split | None:
    """How a layer is split, and the mesh of processes, or None of a layer that is whole."""
    forward = module.__dict__.get("forward")
    forward = getattr(forward, "veneer_around", forward)
    if not isinstance(forward, types.FunctionType) or forward.__closure__ is None:
        return None
    held = inspect.getclosurevars(forward).nonlocals
    style, mesh = held.get("self"), held.get("mesh")
    if style is None or not hasattr(style, "install_forward") or not hasattr(mesh, "get_group"):
        return None
    return style, mesh


class Mode(threading.local):
    """Whether the caller of a split layer wants gradients; one a thread."""

    grad = True


def put_around(module: nn.Module, style: ParallelStyle, mesh: object) -> None:
    """Let `style` install its forward around the class's own.

    Without gradients it would hand the layer local tensors, whose sum over the processes it takes later: right for a
    product, and wrong for whatever else an adapter does. So it is told that there are gradients.
    """
    module.__dict__.pop("forward", None)
    inner, mode = module.forward, Mode()

    def inside(*args: object, **kwargs: object) -> Any:
        with torch.set_grad_enabled(mode.grad), Replicated():
            return inner(*args, **kwargs)

    module.__dict__["forward"] = inside
    style.install_forward(module, mesh)
    around: Callable[..., Any] = module.__dict__["forward"]

    def outside(*args: object, **kwargs: object) -> Any:
        before, mode.grad = mode.grad, torch.is_grad_enabled()
        try:
            with torch.enable_grad():
                return around(*args, **kwargs)
        finally:
            mode.grad = before

    outside.veneer_around = around  # type: ignore[attr-defined]
    module.__dict__["forward"] = outside


def put_back(module: nn.Module, style: ParallelStyle, mesh: object) -> None:
    """As it was before adapters came."""
    module.__dict__.pop("forward", None)
    style.install_forward(module, mesh)


class Replicated(TorchFunctionMode):
    """Treats ordinary tensors among DTensors as replicated.

    torch's own `implicit_replication` does so below autograd, which would keep the ordinary tensors for the backward.
    """

    def __torch_function__(
        self, func: TorchFunction, types: TensorTypes, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, spec = tree_flatten((args, kwargs or {}))
        first = next((t for t in given if sharding.is_distributed(t)), None)
        if first is None or all(sharding.is_distributed(t) for t in given if isinstance(t, Tensor)):
            return func(*args, **(kwargs or {}))
        from torch.distributed.tensor import DTensor, Replicate

        mesh = first.device_mesh
        places = [Replicate()] * mesh.ndim
        given = [
            DTensor.from_local(t, mesh, places, run_check=False)
            if isinstance(t, Tensor) and not sharding.is_distributed(t)
            else t
            for t in given
        ]
        args, kwargs = tree_unflatten(given, spec)
        return func(*args, **kwargs)


@contextmanager
def replicate_plain() -> Iterator[None]:
    """`Replicated`, if there may be DTensors at all."""
    if "torch.distributed.tensor" not in sys.modules or not torch.distributed.is_initialized():
        yield
        return
    with Replicated():
        yield


def split_dimensions(weight: DTensor) -> dict[str, int]:
    """The mesh dimensions that split a weight (out, in): {"out": 0}, {"in": 0}, or none."""
    from torch.distributed.tensor import Shard

    found = {}
    for dimension, place in enumerate(weight.placements):
        if isinstance(place, Shard):
            found["out" if place.dim % weight.ndim == 0 else "in"] = dimension
    return found


def distribute_like(value: Tensor, weight: DTensor, axes: tuple[str, ...], keep: Collection[str] = ()) -> Tensor:
    """An adapter's whole tensor, the same in every process, split as the weight it belongs to is.

    Args:
        value: the tensor.
        weight: the layer's weight (out, in), a DTensor.
        keep: axes along which it stays whole.
        axes: of each of the value's dimensions: "out" or "in" if it is that of the weight, else "".
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = weight.device_mesh
    places: list[Any] = [Replicate()] * mesh.ndim
    for axis, dimension in split_dimensions(weight).items():
        if axis in axes and axis not in keep:
            places[dimension] = Shard(axes.index(axis))
    made: Tensor = distribute_tensor(value.detach(), mesh, places, src_data_rank=None)
    return made


def own_heads(stack: nn.Module, t: Tensor, dim: int) -> Tensor:
    """Return this process's part, along `dim`, of keys and values of all heads, if the stack's key heads are split."""
    if t.shape[dim] == 1 or "torch.distributed.tensor" not in sys.modules:
        return t
    for name, module in stack.named_modules():
        weight = module._parameters.get("weight") if name.endswith(KEYS) else None
        if (
            weight is None
            or style_of(module) is None
            or not sharding.is_distributed(weight)
            or "out" not in split_dimensions(weight)
        ):
            continue
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = weight.device_mesh
        whole = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
        places = [Shard(dim) if i == split_dimensions(weight)["out"] else Replicate() for i in range(mesh.ndim)]
        return whole.redistribute(placements=places).to_local()
    return t


def gather_gradients(parameter: nn.Parameter) -> None:
    """Reduce the gradient of a replicated parameter over the processes."""

    def whole(gradient: Tensor) -> Tensor:
        if not sharding.is_distributed(gradient) or not sharding.is_distributed(parameter):
            return gradient
        made: Tensor = gradient.redistribute(placements=parameter.placements)
        return made

    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # a hook asks for it, and stays
    parameter.register_hook(whole)
    parameter.requires_grad_(trained)
