"""Ordinary floating-point parameters and buffers, on a device or offloaded by accelerate's hooks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import offload, sharding
from .base import Backend, held_tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Plain(Backend):
    name = "plain"
    holds = "float32, float64, bfloat16 and float16 tensors"
    packed = False

    def matches(self, owner: nn.Module, param: str) -> bool:
        weight = held_tensor(owner, param)
        return weight is not None and weight.dtype in FLOATS

    def read(self, owner: nn.Module, param: str) -> Tensor:
        weight = self.storage(owner, param)
        if weight.device.type == "meta":
            value = offload.fetch_offloaded(owner, param)
            if value is not None:
                return value
        return sharding.gathered_value(weight)

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        weight = self.storage(owner, param)
        if sharding.is_sharded(weight):
            with sharding.gathered_in_place([weight], change=True):
                before = weight.detach().clone()
                sharding.fill_from(weight, value)
            return before
        if weight.device.type == "meta" and (old := offload.fetch_offloaded(owner, param)) is not None:
            offload.store_offloaded(owner, param, value.to(old.dtype))
            return old
        # The old storage is kept and swapped back, so unmerging restores its exact bits without arithmetic.
        # On an accelerator it is parked in host memory.
        old = weight.data
        weight.data = value.to(device=old.device, dtype=old.dtype)
        return old if old.device.type == "cpu" else old.cpu()

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        assert isinstance(token, Tensor)
        weight = self.storage(owner, param)
        if sharding.is_sharded(weight):
            with sharding.gathered_in_place([weight], change=True):
                sharding.fill_from(weight, token)
        elif weight.device.type == "meta":
            offload.store_offloaded(owner, param, token)
        else:
            weight.data = token.to(weight.device)

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        assert isinstance(token, Tensor)
        return token

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        return self.storage(owner, param).dtype


PLAIN = Plain()
