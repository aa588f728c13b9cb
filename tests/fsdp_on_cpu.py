"""`veneer ARGUMENTS` where accelerate takes CPUs for devices on which it runs FSDP; it lists none, though PyTorch does."""

from __future__ import annotations

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from veneer.cli import main


def backend(self: PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def device(self: PartialState) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = backend
    PartialState.set_device = device
    main()
