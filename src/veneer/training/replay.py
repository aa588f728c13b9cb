"""A forward that is run once more, to see what went on inside: which modules ran, and where a NaN came up first.

Nobody pays for it in a healthy run: no module has a hook while the model trains, and kernels serve it as ever.
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
    """One forward of a model, with what is needed to run it again."""

    root: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    held: dict[str, Any]  # what was chosen for this call alone
    random: Tensor
    on_device: Tensor | None
    autocast: tuple[str, torch.dtype, bool]

    @classmethod
    def of(cls, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], router: Router | None) -> Call:
        """What is about to run."""
        local = None if router is None else router.local
        held = {} if local is None else {name: getattr(local, name) for name in ("chosen", "rows", "tasks")}
        device = next((p.device.type for p in root.parameters()), "cpu")
        accelerator = torch.accelerator.is_available() and device != "cpu"
        return cls(
            root,
            args,
            kwargs,
            held,
            torch.get_rng_state(),
            torch.get_device_module(device).get_rng_state() if accelerator else None,
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)),
        )


@dataclass
class Seen:
    """What a second run showed.

    Attributes:
        ran: the modules in the order in which they were called, each once.
        first: the first module whose output is not finite, with the reason, or None.
    """

    ran: list[nn.Module] = field(default_factory=list)
    first: tuple[str, str] | None = None


def rerun_forward(call: Call, router: Router | None) -> Seen:
    """Run a forward again as it ran: same input, adapters, random numbers and autocast; nothing is changed by it."""
    seen, handles = Seen(), []
    known: set[nn.Module] = set()

    def entered(module: nn.Module, args: object) -> None:
        if module not in known:
            known.add(module)
            seen.ran.append(module)

    def left(name: str, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        if seen.first is None and not is_finite(output):
            seen.first = (name, explain_first(module, (args, kwargs)))

    for name, module in call.root.named_modules():
        handles.append(module.register_forward_pre_hook(entered))
        if name:
            handles.append(module.register_forward_hook(partial(left, name), with_kwargs=True))
    statistics = [
        (b, b.clone())
        for m in call.root.modules()
        if isinstance(m, _BatchNorm)
        for b in m._buffers.values()
        if b is not None
    ]
    device, dtype, enabled = call.autocast
    now, there = torch.get_rng_state(), torch.get_device_module(device) if call.on_device is not None else None
    now_there = None if there is None else there.get_rng_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            if router is not None:
                stack.enter_context(router.hold(**call.held))
            torch.set_rng_state(call.random)
            if there is not None:
                there.set_rng_state(call.on_device)
            call.root.forward(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
        torch.set_rng_state(now)
        if there is not None:
            there.set_rng_state(now_there)
        with torch.no_grad():
            for buffer, value in statistics:
                buffer.copy_(value)
    seen.ran = [m for m in seen.ran if m is not call.root]
    return seen


def floating_tensors(value: object) -> Iterator[Tensor]:
    """The floating tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from floating_tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from floating_tensors(part)


def is_finite(value: object) -> bool:
    return all(bool(t.isfinite().all()) for t in floating_tensors(value))


def explain_first(module: nn.Module, inputs: object) -> str:
    """Why the first output that is not finite is not."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            whose = "the adapter is broken: load it again, or start anew with a lower learning rate"
            return f"its {name!r} is not finite; " + (
                whose if ":" in name else "the base model's file or dtype is broken"
            )
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
