"""A frozen weight that is stored quantized and dequantized on use.

`Deferred` stands in for the weight during one call. A product with it, or with one matrix of a stack, dequantizes the part it
needs, saves only the packed weight, and dequantizes again for the gradient of its input. Every other use gets
the dequantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from ..algebra.protocols import AutogradContext, TensorTypes, TorchFunction

Make = Callable[[int | None, torch.dtype], Tensor]  # which of the stack, None for all, and the dtype -> the weight

# What is read off the tensor itself.
READ: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu",
        "is_meta", "is_quantized", "is_sparse",
    )),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.get_device,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size,
    torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip

TURNS = (Tensor.mT.__get__,)  # type: ignore[attr-defined]
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class Deferred(Tensor):
    """A weight (m, n), or a stack of them (E, m, n), that is not dequantized yet. It has no memory of its own.

    Attributes:
        make: returns the dequantized weight.
        flipped: `make` gives the transpose.
    """

    make: Make
    flipped: bool

    @staticmethod
    def __new__(
        cls, make: Make, shape: torch.Size, dtype: torch.dtype, device: torch.device, flipped: bool = False
    ) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.make, made.flipped = make, flipped
        return made

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, in its own dtype or in `dtype`."""
        value = self.make(None, self.dtype if dtype is None else dtype)
        return value.mT if self.flipped else value

    def one(self, index: int) -> Deferred:
        """One matrix of the stack."""
        count = self.shape[0]
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of bounds for a stack of {count}")
        make, at = self.make, index % count
        return Deferred(lambda _, dtype: make(at, dtype), self.shape[1:], self.dtype, self.device, self.flipped)

    def turned(self) -> Deferred:
        """The transpose of each matrix."""
        *stack, m, n = self.shape
        return Deferred(self.make, torch.Size((*stack, n, m)), self.dtype, self.device, not self.flipped)

    @classmethod
    def __torch_function__(
        cls, func: TorchFunction, types: TensorTypes, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READ:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in TURNS:
            return args[0].turned()
        if func is Tensor.__getitem__ and isinstance(args[0], Deferred) and args[0].ndim == 3:
            index = args[1]
            if isinstance(index, Tensor) and not index.ndim and not index.is_floating_point():
                index = int(index)
            if type(index) is int:
                return args[0].one(index)
        if func in PRODUCTS and not kwargs and len(args) == 2 and type(args[0]) is Tensor and args[1].ndim == 2:
            return Product.apply(args[0], args[1].dense)  # type: ignore[no-untyped-call]
        args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, Deferred) else a, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: TorchFunction, types: TensorTypes, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, Deferred) else a, (args, kwargs or {}))
        return func(*args, **kwargs)


class Product(torch.autograd.Function):
    """X (..., m) times a frozen weight (m, n), which `dense` makes."""

    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense = dense
        return x @ dense(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: AutogradContext, g: Tensor) -> Any:  # (..., n)
        return g @ ctx.dense(g.dtype).mT, None
