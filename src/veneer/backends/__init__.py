"""How frozen weights are stored: one file a storage format, of which the first that matches a weight serves it. May import
distributed and algebra.

A format is added by a file here with a `Backend` in it, and a line in `backends`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from .base import held_tensor, is_float

if TYPE_CHECKING:
    from .base import Backend


@cache
def all_backends() -> tuple[Backend, ...]:
    """The backends, those of libraries first: a quantized weight can look like a plain one."""
    from .awq import AWQ
    from .bnb import EightBit, FourBit
    from .fp8 import FP8
    from .gptq import GPTQ
    from .hqq import HQQ
    from .mxfp4 import MXFP4
    from .plain import PLAIN
    from .quanto import Quanto
    from .torchao import TorchAO

    return FourBit(), EightBit(), HQQ(), TorchAO(), Quanto(), GPTQ(), AWQ(), FP8(), MXFP4(), PLAIN


def backend_of(owner: nn.Module, param: str, name: str) -> Backend:
    """Return the backend of the weight `param` of `owner`.

    Raises:
        TypeError: no backend reads the weight; the message has `name`.
    """
    for backend in all_backends():
        if backend.matches(owner, param):
            return backend
    raise unknown_storage(owner, param, name)


def unknown_storage(owner: nn.Module, param: str, name: str) -> TypeError:
    """The error that a weight is stored in a way that no backend knows."""
    weight = held_tensor(owner, param)
    stored = "nothing" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
    return TypeError(
        f"{name}: no weight backend reads {type(owner).__name__}.{param} (it holds {stored}); allowed are "
        f"{'; '.join(b.holds for b in all_backends())}; load the base model in one of these, leave the layer out of "
        "target_modules, or add a backend: one file in veneer/backends/ with a class of Backend's methods, and its line "
        "in backends()"
    )


def unread_matrix(module: nn.Module) -> str | None:
    """Name of a matrix of integers or of 8-bit floats in a module without children that no backend reads."""
    if module._modules:
        return None
    tensors = {
        n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and ":" not in n
    }
    integers = (n for n, t in tensors.items() if t.ndim > 1 and t.dtype != torch.bool and not is_float(t))
    found = next(integers, None)
    known = found is None or any(b.packed and b.matches(module, n) for b in all_backends() for n in tensors)
    return None if known else found


def linear_of(module: nn.Module) -> tuple[str, int, int] | None:
    """Name of the weight, and sizes (in, out), of a library's linear layer that is not an nn.Linear, or None."""
    for backend in all_backends():
        found = backend.linear(module)
        if found is not None:
            return found
    return None


def bare_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's quantized weights that can be adapted by name; see `Backend.bare`."""
    return {name: shape for backend in all_backends() for name, shape in backend.bare(module).items()}


def prepare_for_gradients(root: nn.Module) -> None:
    """Make the modules below `root` ready for gradients to go through."""
    libraries = [b for b in all_backends() if b.packed]
    for module in root.modules():
        for backend in libraries:
            backend.settle(module)
