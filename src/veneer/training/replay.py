"""Runs a forward again to see which modules ran and where a NaN appeared first.

This costs nothing in a healthy run: modules get hooks for the second run only, so kernels serve training as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..injection.router import Router

HALF_LIMIT = torch.finfo(torch.float16).max


@dataclass
class Call:
    """One forward of a model, with the state that is needed to run it again.

    Attributes:
        root: the model.
        args: of the forward.
        kwargs: of the forward.
        chosen: the adapters that were chosen for this call alone.
        random: state of the CPU's random numbers.
        random_on: the same for each accelerator that holds parameters.
        autocast: device type, dtype and whether autocast is enabled.
    """

    root: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chosen: dict[str, Any]
    random: Tensor
    random_on: dict[torch.device, Tensor]
    autocast: tuple[str, torch.dtype, bool]

    @classmethod
    def of(cls, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], router: Router | None) -> Call:
        """Record the forward that is about to run."""
        local = None if router is None else router.local
        chosen = {} if local is None else {"chosen": local.chosen, "rows": local.rows, "tasks": local.tasks}
        devices = list(dict.fromkeys(p.device for p in root.parameters()))
        random_on = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")}
        kind = devices[0].type if devices else "cpu"
        autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return cls(root, args, kwargs, chosen, torch.get_rng_state(), random_on, autocast)


@dataclass
class Seen:
    """What a second run showed.

    Attributes:
        ran: the modules in the order in which they were first called, without the model itself.
        first: the first module whose output is not finite, with the reason, or None.
    """

    ran: list[nn.Module] = field(default_factory=list)
    first: tuple[str, str] | None = None


def rerun_forward(call: Call, router: Router | None) -> Seen:
    """Run a forward again with the same input, adapters, random numbers and autocast, and leave no trace in the model."""
    seen = Seen()
    known = {call.root}
    kind, dtype, enabled = call.autocast

    def enter(module: nn.Module, args: object) -> None:
        if module not in known:
            known.add(module)
            seen.ran.append(module)

    def leave(name: str, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        if seen.first is None and not is_finite(output):
            seen.first = (name, explain_first(module, (args, kwargs)))

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, module in call.root.named_modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            if name:
                stack.callback(module.register_forward_hook(partial(leave, name), with_kwargs=True).remove)
            if isinstance(module, _BatchNorm):  # in train mode a forward updates its statistics
                for buffer in module.buffers(recurse=False):
                    stack.callback(buffer.copy_, buffer.clone())
        devices = list(call.random_on)
        stack.enter_context(torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cpu"))
        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        if router is not None:
            stack.enter_context(router.hold(**call.chosen))
        torch.set_rng_state(call.random)
        for device, state in call.random_on.items():
            torch.get_device_module(device).set_rng_state(state, device)
        # Not __call__, whose hooks on the model are those of the watch.
        call.root.forward(*call.args, **call.kwargs)
    return seen


def floating_tensors(value: object) -> Iterator[Tensor]:
    """The floating tensors in the arguments or the output of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from floating_tensors(part)


def is_finite(value: object) -> bool:
    return all(bool(t.isfinite().all()) for t in floating_tensors(value))


def explain_first(module: nn.Module, inputs: object) -> str:
    """Explain the first output that is not finite."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            remedy = "the base model's file or dtype is broken"
            if ":" in name:  # only adapter parameters have a colon in their names
                remedy = "the adapter is broken: load it again, or start anew with a lower learning rate"
            return f"its {name!r} is not finite; {remedy}"
    dtypes = {t.dtype for t in floating_tensors(inputs)} | {
        p.dtype for p in module.parameters() if p.is_floating_point()
    }
    overflows = f"computes in float16, whose largest number is {HALF_LIMIT:g}; use bfloat16 or float32"
    if not is_finite(inputs):
        before = "what goes into it is not finite already: look at the batch, and at what is computed between the modules before"
        return f"{before}, which {overflows}" if torch.float16 in dtypes else before
    largest = max((float(t.abs().max()) for t in floating_tensors(inputs) if t.numel()), default=0.0)
    if torch.float16 in dtypes:
        return f"inputs are finite, up to {largest:.3g}, and it {overflows}"
    return f"inputs are finite, up to {largest:.3g}: it divides by 0, or takes a root or logarithm where there is none"
