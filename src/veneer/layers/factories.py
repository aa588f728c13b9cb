"""Factories of an adapter's fresh tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..distributed.sharding import gathered


class TensorFactory:
    """Makes tensors on one device in one dtype.

    On the meta device, which is used if a file brings the values, they cost nothing.

    Attributes:
        device: where they are made; None for torch's default.
        dtype: theirs.
    """

    device: torch.device | None = None
    dtype: torch.dtype = torch.float32

    @property
    def meta(self) -> bool:
        return self.device is not None and self.device.type == "meta"

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=self.dtype)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        t = self.empty(*shape)
        return t if self.meta else t.normal_(0.0, std)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        t = self.empty(*shape)
        return t if self.meta else t.uniform_(-bound, bound)

    def kaiming_uniform(self, *shape: int, a: float = math.sqrt(5)) -> Tensor:
        t = self.empty(*shape)
        return t if self.meta else nn.init.kaiming_uniform_(t, a=a)

    def computed(self, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
        """`make()` cast to the adapter's dtype, or only its shape where a file brings the values."""
        if self.meta:
            return self.empty(*shape)
        made = gathered(make().detach()).reshape(shape)
        return made.to(device=self.device, dtype=self.dtype, copy=True).contiguous()  # never the base's storage
