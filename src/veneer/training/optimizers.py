"""An optimizer's state by the names of parameters, whole, so that a run can go on in another layout of processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed.sharding import fill_from, gathered, is_partitioned

STEP = "step"


def innermost_optimizer(optimizer: object) -> Any:
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def make_room(optimizer: Any, keys: Iterable[str]) -> None:
    """Let ZeRO's flat partitions have state, as after a first step; until one it has none to set."""
    zero = optimizer
    while hasattr(zero.optimizer, "optimizer"):
        zero = zero.optimizer
    flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    for flat in flats:
        held = zero.optimizer.state[flat]
        for key in keys:
            held.setdefault(
                key, torch.zeros((), dtype=torch.float32) if key == STEP else torch.zeros_like(flat.detach())
            )
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # of stages 1 and 2
        zero._lazy_init_hp_params_optimizer_state()


def by_deepspeed(parameter: Tensor) -> bool:
    """Whether ZeRO holds the parameter's optimizer state, in flat partitions of its own."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def read_state(optimizer: object, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of each parameter as `name|key`, on the CPU. Every process calls it.

    Args:
        optimizer: torch's, or one that accelerate or DeepSpeed wrapped.
        parameters: trained parameters by name.
    """
    inner = innermost_optimizer(optimizer)
    found: dict[str, Tensor] = {}
    states = [s for s in inner.state.values() if s]
    for name, parameter in parameters.items():
        if by_deepspeed(parameter):
            state = states[0] if states else {}
            for key, value in state.items():
                if key == STEP or not isinstance(value, Tensor) or not value.ndim:
                    found[f"{name}|{key}"] = torch.as_tensor(value).detach().float().cpu().clone()
                else:
                    full = sys.modules["deepspeed.utils"].safe_get_full_optimizer_state(parameter, key)
                    found[f"{name}|{key}"] = full.detach().cpu().clone()
        else:
            for key, value in inner.state.get(parameter, {}).items():
                found[f"{name}|{key}"] = gathered(torch.as_tensor(value).detach()).float().cpu().clone()
    return found


def write_state(optimizer: object, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `read` found, and what ZeRO keeps of the parameters their present values.

    Raises:
        ValueError: the state of a parameter is missing.
    """
    inner = innermost_optimizer(optimizer)
    if any(map(by_deepspeed, parameters.values())):
        make_room(optimizer, dict.fromkeys(k.rpartition("|")[2] for k in state))
    for name, parameter in parameters.items():
        own = {k.rpartition("|")[2]: v for k, v in state.items() if k.rpartition("|")[0] == name}
        if not own:
            raise ValueError(f"the checkpoint has no optimizer state of {name}; it was written by another optimizer")
        if by_deepspeed(parameter):
            utils = sys.modules["deepspeed.utils"]
            for key, value in own.items():
                if value.ndim or key != STEP:
                    utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
            for held in inner.state.values():
                if STEP in own and held:
                    held[STEP] = type_like(own[STEP], held.get(STEP))
        else:
            made = {}
            for key, value in own.items():
                if value.shape == parameter.shape and value.ndim:
                    made[key] = torch.zeros_like(parameter, requires_grad=False)
                    fill_from(made[key], value)
                else:
                    made[key] = value.clone()
            inner.state[parameter] = made


def type_like(value: Tensor, held: Any) -> Any:
    """A count of steps as the optimizer keeps it: a tensor or a number."""
    return value.clone().to(held) if isinstance(held, Tensor) else type(held or 0)(value.item())


def read_master(parameter: Tensor) -> Tensor:
    """The whole float32 copy that ZeRO keeps of a parameter; a collective."""
    found: Tensor = sys.modules["deepspeed.utils"].safe_get_full_fp32_param(parameter)
    return found


def write_master(parameter: Tensor, value: Tensor) -> None:
    """Set it; every process calls it with the same value."""
    sys.modules["deepspeed.utils"].safe_set_full_fp32_param(parameter, value.to(parameter.device))


def put_master(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set the float32 copies that ZeRO keeps of parameters to whole values."""
    for name, parameter in parameters.items():
        if by_deepspeed(parameter):
            write_master(parameter, values[name])
