"""Parameters of which each process holds a part: DTensor (FSDP2, tensor parallel) and DeepSpeed's ZeRO-3.

Reading the whole of one is a collective: every process calls it, in the same order. ZeRO-3 leaves a parameter of no
elements, marked by `ds_id`, in place of each one; nothing here imports deepspeed before the model has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 manages a parameter."""
    return hasattr(tensor, "ds_id")


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_sharded(tensor: Any) -> bool:
    """Whether a process may hold less than the whole tensor."""
    return is_partitioned(tensor) or is_distributed(tensor)


def how(tensor: Any) -> str:
    """What shards it, for messages."""
    return "DeepSpeed ZeRO-3" if is_partitioned(tensor) else "fully_shard or tensor parallelism (DTensor)"


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return torch.Size(shape)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be one rank's shard; of ZeRO-3's only within `available`."""
    full = getattr(tensor, "full_tensor", None)
    made: Tensor = tensor if full is None else full()
    return made


@contextmanager
def available(tensors: Iterable[Any], *, change: bool = False) -> Iterator[None]:
    """Within the block, ZeRO-3's parameters among `tensors` hold their whole values, in every process.

    Args:
        tensors: any; those that are whole already are left alone.
        change: whether the block writes to them; what rank 0 wrote then goes to all.
    """
    found = {id(t): t for t in tensors if is_partitioned(t)}
    absent = [t for t in found.values() if t.ds_status.name == "NOT_AVAILABLE"]
    if not absent:
        yield
        return
    zero = sys.modules["deepspeed"].zero
    with zero.GatheredParameters(absent, modifier_rank=0 if change else None):
        yield


def fill(own: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor, or each rank's part of it. Every process has the same value."""
    if is_distributed(own):
        from torch.distributed.tensor import distribute_tensor

        mesh, places = own.device_mesh, own.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(own.dtype).to(own.device), mesh, places, src_data_rank=None)
    own.copy_(value)


def writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes the file of such tensors: rank 0 of sharded ones, everyone who is asked of others."""
    return rank() == 0 or not any(is_sharded(t) for t in tensors)


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait(tensors: Iterable[Tensor]) -> None:
    """Where tensors are sharded, wait for every process, so that nobody reads a file before it is written."""
    if dist.is_available() and dist.is_initialized() and any(is_sharded(t) for t in tensors):
        dist.barrier()


def refuse_attaching(root: nn.Module) -> None:
    """Raise RuntimeError if the model's own parameters are sharded or flattened already.

    Adapters come first: only then does what shards the model shard and gather theirs too. Weights that tensor
    parallelism split are no DTensor of FSDP's and stay as they are.
    """
    for name, parameter in root.named_parameters():
        if ":" not in name and is_sharded(parameter):
            remedy = "get_peft_model(model, config) first, then fully_shard(model)"
            if is_partitioned(parameter):
                remedy = (
                    "get_peft_model(model, config) first, then deepspeed.initialize(model=model, ...); a model that "
                    "from_pretrained partitioned at once (zero.Init, made by TrainingArguments or HfDeepSpeedConfig "
                    "before it) has to be loaded before those are made"
                )
            raise RuntimeError(
                f"{name} is already sharded by {how(parameter)}; attach adapters before sharding: {remedy}"
            )
    for name, module in root.named_modules():
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"):
            where = f"{name or 'the model'} is a {type(module).__name__}"
            raise RuntimeError(f"{where}; attach adapters before it is wrapped: get_peft_model(model, config) first")
