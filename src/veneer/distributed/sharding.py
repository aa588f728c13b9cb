"""Parameters of which each process holds a part: DTensor (FSDP2, tensor parallel) and DeepSpeed's ZeRO-3.

Reading the whole of one is a collective: every process calls it, in the same order. ZeRO-3 leaves a parameter of no
elements, marked by `ds_id`, in place of each one; nothing here imports deepspeed before the model has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    class ZeroTensor(Tensor):
        """A parameter that ZeRO-3 manages, by the attributes that are read here."""

        ds_status: Any
        ds_shape: torch.Size
        ds_tensor: Tensor
        ds_process_group: dist.ProcessGroup


ENGINE = "_external_params"  # attribute that deepspeed.initialize sets on every module under ZeRO-3


def is_partitioned(tensor: object) -> TypeGuard[ZeroTensor]:
    """Whether ZeRO-3 manages a parameter."""
    return hasattr(tensor, "ds_id")


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_sharded(tensor: object) -> bool:
    """Whether a process may hold less than the whole tensor."""
    return is_partitioned(tensor) or is_distributed(tensor)


def sharding_name(tensor: object) -> str:
    """What shards it, for messages."""
    return "DeepSpeed ZeRO-3" if is_partitioned(tensor) else "fully_shard or tensor parallelism (DTensor)"


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return torch.Size(shape)


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be one rank's shard; of ZeRO-3's only within `available`."""
    full = getattr(tensor, "full_tensor", None)
    made: Tensor = tensor if full is None else full()
    return made


def gathered_value(tensor: Tensor) -> Tensor:
    """A parameter, or a gathered copy if ZeRO-3 partitions it (a collective then)."""
    if not is_partitioned(tensor) or tensor.ds_status.name == "AVAILABLE":
        return tensor
    with gathered_in_place([tensor]):
        return tensor.detach().clone()


@contextmanager
def gathered_in_place(tensors: Iterable[Tensor | None], *, change: bool = False) -> Iterator[None]:
    """Within the block, ZeRO-3's parameters among `tensors` hold their whole values, in every process.

    Args:
        tensors: any; those that are whole already are left alone.
        change: whether the block writes to them; rank 0's values are then broadcast.
    """
    found = {id(t): t for t in tensors if is_partitioned(t)}
    absent = [t for t in found.values() if t.ds_status.name == "NOT_AVAILABLE"]
    if not absent:
        yield
        return
    zero = sys.modules["deepspeed"].zero
    with zero.GatheredParameters(absent, modifier_rank=0 if change else None):
        yield


def fill_from(own: Tensor, value: Tensor) -> None:
    """Copy a value, whole or sharded in any way, into a tensor, or each rank's part of it.

    Of a whole one every process has the same.
    """
    if is_distributed(own) and is_distributed(value):
        value = value.redistribute(own.device_mesh, own.placements)
    elif is_distributed(own):
        from torch.distributed.tensor import distribute_tensor

        mesh, places = own.device_mesh, own.placements
        value = distribute_tensor(value.to(own.dtype).to(own.device), mesh, places, src_data_rank=None)
    with torch.no_grad():
        own.copy_(value)


def fill_partition(own: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter of ZeRO's, whatever state of being gathered it is in."""
    with torch.no_grad():
        if is_partitioned(own):
            part = own.ds_tensor.data.view(-1)  # this rank's, padded at the end
            mine = value.reshape(-1)[part.numel() * dist.get_rank(own.ds_process_group) :][: part.numel()]
            part[: mine.numel()].copy_(mine)
        if own.shape == value.shape:
            own.copy_(value)


def writes_file(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes the file of such tensors: rank 0 of sharded ones, everyone who is asked of others."""
    return process_rank() == 0 or not any(is_sharded(t) for t in tensors)


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def wait_for_all(tensors: Iterable[Tensor]) -> None:
    """Wait for every process if tensors are sharded, so that no process reads a file before it is written."""
    if is_initialized() and any(is_sharded(t) for t in tensors):
        dist.barrier()


def refuse_attaching(root: nn.Module, named: Mapping[str, nn.Module]) -> None:
    """Raise RuntimeError if the model's parameters are already sharded or flattened.

    Adapters come first: only then does it shard and gather theirs too. Weights that from_pretrained split between the
    processes while it read them are no obstacle: by zero.Init, as deepspeed.initialize comes later and finds the adapters;
    by tensor parallelism, into which adapters go as they are.
    """
    kinds = {type(m) for m in named.values()}
    fully = any(hasattr(k, "_get_fsdp_state") for k in kinds)
    for name, parameter in root.named_parameters() if fully or hasattr(root, ENGINE) else ():
        taken = fully and is_distributed(parameter)
        if ":" not in name and (taken or (is_partitioned(parameter) and hasattr(root, ENGINE))):
            remedy = "fully_shard(model)"
            if is_partitioned(parameter):
                remedy = "deepspeed.initialize(model=model, ...)"
            raise RuntimeError(
                f"{name} is already sharded by {sharding_name(parameter)}; attach adapters before sharding: "
                f"get_peft_model(model, config) first, then {remedy}"
            )
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
    for name, module in named.items() if any(k.__name__ in wrappers for k in kinds) else ():
        if type(module).__name__ in wrappers:
            where = f"{name or 'the model'} is a {type(module).__name__}"
            raise RuntimeError(f"{where}; attach adapters before it is wrapped: get_peft_model(model, config) first")
