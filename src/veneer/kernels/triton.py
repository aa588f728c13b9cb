"""Low-rank updates, mixed batches, dropout and gated MLPs on a GPU. Triton is imported by the first call.

Every function takes matrices with any strides, multiplies in the dtype of the activations and sums in float32, so
adapters' parameters stay in float32 and no cast copy of them is made. With `seed`, dropout is part of the product:
its mask is drawn again from the seed wherever it is needed, a function of the row and the column alone.

The block sizes fit H100 and, at 96 KiB of shared memory, older cards.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROGRAMS = 264  # worth splitting a sum for: two for each of an H100's 132 processors
ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once, too


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_available(x: Tensor) -> bool:
    """Whether to run these for x: on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1), if installed."""
    if not (x.is_cuda or INTERPRETED) or x.dtype not in DTYPES or not is_installed():
        return False
    return INTERPRETED or group_starts(x.device)


@functools.cache
def group_starts(device: torch.device) -> bool:
    """Whether a GPU is one that the block sizes fit, and a kernel can be built for it and started."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    e = torch.zeros(1, 1, device=device)
    try:
        gate_forward(e, e)
    except Exception as error:  # no C compiler, a driver of another version
        warnings.warn(
            f"{device}: Triton is installed and its kernels do not start ({type(error).__name__}: {error}), so PyTorch's "
            "operations run in their place, with more memory and time; Triton needs a C compiler and the CUDA driver",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def forward_code() -> Any:
    from . import triton_code

    return triton_code


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout, (1,) int64, from torch's generator of that device, without waiting for the device."""
    return torch.randint(2**63 - 1, (1,), device=device)


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows of a batch sorted by slot, and the blocks of rows that programs take. Made by `route`.

    Attributes:
        order: (M,) int32, the rows, those of slot 0 first after those of no slot.
        offsets: (S + 1,) int32, where each slot's segment begins in `order`, and where the last ends.
        slot: (blocks,) int32, the slot of each block, -1 where a block is not used.
        first: (blocks,) int32, where the block begins in `order`.
        size: rows of a block.
    """

    order: Tensor
    offsets: Tensor
    slot: Tensor
    first: Tensor
    size: int


def route_rows(slots: Tensor, count: int) -> Routing:
    """Plan a batch once for all layers; nothing waits for the device.

    Args:
        slots: (M,) int32, the slot of each row; -1 for rows that are left as they are, as is any slot from `count` on.
        count: slots there are, S.
    """
    M, device = slots.shape[0], slots.device
    size = 64 if 16 * count < M else 16
    ordered, order = slots.sort(stable=True)
    bounds = torch.arange(count + 1, device=device, dtype=slots.dtype)
    offsets = torch.searchsorted(ordered, bounds)  # (S + 1,)
    blocks = (offsets.diff() + size - 1) // size  # (S,)
    last = blocks.cumsum(0)  # (S,)
    numbers = torch.arange(min(M, -(-M // size) + count), device=device)  # as many as there can be
    slot = torch.searchsorted(last, numbers, right=True)  # (blocks,), S where unused
    own = slot.clamp(max=count - 1)
    first = offsets[own] + (numbers - (last - blocks)[own]) * size
    slot = torch.where(slot < count, slot, -1)
    return Routing(order.int(), offsets.int(), slot.int(), first.int(), size)


def shrink_dropped(
    x: Tensor,
    A: Tensor,
    scale: float = 1.0,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    scales: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Multiply: scale * x A^T; with a seed, scale / (1 - p) * (x ⊙ mask) A^T. The sum over K is split where rows are few.

    Args:
        x: (M, K).
        A: (r, K); those of layers that share x are stacked, (r1 + r2 + ..., K). With routing (S, r, K).
        scale: a number.
        p: probability of dropping an entry, below 1.
        seed: (1,) int64 on the device of x, from `draw_seed`.
        scales: (S,) float32, with routing: also multiplied by the number of the row's slot.
        routing: the slot of each row.

    Returns:
        h (M, r), in the dtype of x; 0 for rows of no slot.
    """
    M, K = x.shape
    R = A.shape[-2]
    fits_kernel("A", A, *slots_of(routing, M), R, K)
    if not M:
        return x.new_empty(0, R)
    BM, BR, BK = rows_of(M, routing), columns_of(R), 64
    grid_m, grid_r = blocks_of(M, routing), -(-R // BR)
    splits = max(1, min(PROGRAMS // (grid_m * grid_r), K // (4 * BK)))
    span = -(-K // (splits * BK)) * BK  # columns of x a program sums over
    splits = -(-K // span)
    make = x.new_zeros if routing else x.new_empty  # rows of no slot are not visited
    parts = make(splits, M, R, dtype=x.dtype if splits == 1 else torch.float32)
    with on(x):
        forward_code().shrink_kernel[grid_m, grid_r, splits](
            x, A, parts, *factors(scale, p, seed, scales, routing), *segments(routing), *tables(routing),
            M, R, K, span,
            *x.stride(), *(A.stride() if routing else (0, *A.stride())), *parts.stride(),
            PRECISION=precision(x), BM=BM, BR=BR, BK=BK, num_warps=4, num_stages=3,
        )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(x.dtype)


def expand_add_(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    scales: Tensor | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Add in place: y += scale * h B^T; with a seed, y += scale / (1 - p) * (h B^T) ⊙ mask, the mask that `shrink` has.

    Args:
        y: (M, N).
        h: (M, r).
        B: (N, r); with routing (S, N, r), and rows of no slot are not touched.
        scale: a number.
        p: probability of dropping an entry, below 1.
        seed: (1,) int64 on the device of y.
        scales: (S,) float32, with routing: also multiplied by the number of the row's slot.
        routing: the slot of each row.

    Returns:
        y.
    """
    M, N = y.shape
    R = h.shape[-1]
    fits_kernel("h", h, M, R)
    fits_kernel("B", B, *slots_of(routing, M), N, R)
    if not M:
        return y
    BM, BN, BR = rows_of(M, routing), wide(y), columns_of(R)
    grid = (blocks_of(M, routing), -(-N // BN))
    with on(y):
        forward_code().expand_kernel[grid](
            h, B, y, *factors(scale, p, seed, scales, routing), *segments(routing), *tables(routing),
            M, N, R,
            *h.stride(), *(B.stride() if routing else (0, *B.stride())), *y.stride(),
            PRECISION=precision(y), BM=BM, BN=BN, BR=BR, num_warps=4, num_stages=2,
        )  # fmt: skip
    return y


def outer_product(
    g: Tensor,
    x: Tensor,
    scale: float = 1.0,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    scales: Tensor | None = None,
    routing: Routing | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply: scale * g^T x; with a seed, scale / (1 - p) * g^T (x ⊙ mask). The gradient of A, and that of B transposed.

    Args:
        g: (M, r).
        x: (M, K).
        scale: a number.
        p: probability of dropping an entry of x, below 1.
        seed: (1,) int64 on the device of x.
        scales: (S,) float32, with routing: also multiplied by the number of the slot.
        routing: the slot of each row.
        dtype: of the result; float32 unless given.

    Returns:
        (r, K); with routing (S, r, K), from the rows of each slot, 0 for a slot without rows.
    """
    (M, R), K = g.shape, x.shape[1]
    fits_kernel("x", x, M, K)
    (S,) = slots_of(routing, M) or (1,)
    dtype = dtype or torch.float32
    out = x.new_zeros(S, R, K, dtype=dtype) if not M else x.new_empty(S, R, K, dtype=dtype)
    if M:
        BM, BR, BK = 64 if M > 32 and x.dtype != torch.float32 else 32, columns_of(R), wide(x)
        tiles = -(-K // BK) * -(-R // BR) * S
        splits = max(1, min(PROGRAMS // tiles, M // (4 * BM)))
        parts = out[None] if splits == 1 else x.new_empty(splits, S, R, K, dtype=torch.float32)
        with on(x):
            forward_code().outer_kernel[-(-K // BK), -(-R // BR), S * splits](
                g, x, parts, *factors(scale, p, seed, scales, routing), *segments(routing),
                M, R, K, splits,
                *g.stride(), *x.stride(), *parts.stride(),
                PRECISION=precision(x), BM=BM, BR=BR, BK=BK, num_warps=4, num_stages=2,
            )  # fmt: skip
        if splits > 1:
            out = parts.sum(0).to(dtype)
    return out if routing else out[0]


def gate_forward(e: Tensor, g: Tensor, act: str = "silu") -> Tensor:
    """Compute m = act(e) * g.

    Args:
        e, g: (M, F), of any row stride.
        act: "silu", or "gelu_tanh", gelu with its tanh approximation.

    Raises:
        ValueError: another activation.
    """
    m = torch.empty(e.shape, dtype=e.dtype, device=e.device)
    gate_grid(forward_code().gate_kernel, act, e, g, m)
    return m


def gate_backward_(dm: Tensor, e: Tensor, g: Tensor, act: str = "silu", *, remake: bool = True) -> tuple[Tensor, ...]:
    """The gradients of `gate` and, with `remake`, its output again, in one pass. That of e is written over dm.

    Args:
        dm: (M, F), contiguous, in the dtype of e.
        e, g: (M, F), of any row stride.
        act: as for `gate`.
        remake: whether m is wanted.

    Returns:
        de and dg, and m with `remake`: (M, F), contiguous, in the dtype of e.

    Raises:
        ValueError: another activation, or a dm that cannot be written over.
    """
    if not dm.is_contiguous() or dm.dtype != e.dtype:
        raise ValueError(
            f"dm: its strides are {dm.stride()} and its dtype {dm.dtype}, and the gradient of e is written over it; make it "
            f"contiguous and {e.dtype}"
        )
    made = tuple(torch.empty(e.shape, dtype=e.dtype, device=e.device) for _ in range(2 if remake else 1))
    gate_grid(forward_code().gate_backward_kernel, act, dm, e, g, *(made if remake else (*made, None)))
    return dm, *made


def gate_grid(kernel: Any, act: str, *tensors: Tensor | None) -> None:
    """Run an elementwise kernel over the rows of (M, F), or over one row where all are contiguous."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}: must be one of {', '.join(ACTIVATIONS)}")
    flat = all(t is None or t.is_contiguous() for t in tensors)
    first = tensors[0]
    assert first is not None
    for tensor in tensors:
        if tensor is not None:
            fits_kernel("e, g or dm", tensor, *first.shape)
    M, F = (1, first.numel()) if flat else first.shape
    if not first.numel():
        return
    tensors = tuple(t if t is None or t.stride(1) == 1 or flat else t.contiguous() for t in tensors)
    strides = [0 if t is None or flat else t.stride(0) for t in tensors]
    blocks = -(-F // 1024)
    with on(first):
        kernel[(M * blocks,)](*tensors, F, blocks, *strides, GELU=act == "gelu_tanh", BLOCK=1024, num_warps=4)


def on(x: Tensor) -> Any:
    """The device of x as the current one, which is where Triton launches."""
    return torch.cuda.device_of(x)


def fits_kernel(name: str, found: Tensor, *wanted: int) -> None:
    """Refuse a shape that would be read past its end."""
    if found.shape != wanted:
        raise ValueError(f"{name}: its shape is {tuple(found.shape)} and the others' call for {wanted}")


def slots_of(routing: Routing | None, M: int) -> tuple[int, ...]:
    """(S,), the leading shape of stacked slots, or ()."""
    if routing is None:
        return ()
    fits_kernel("routing", routing.order, M)
    return (routing.offsets.shape[0] - 1,)


def factors(scale: float, p: float, seed: Tensor | None, scales: Tensor | None, routing: Routing | None) -> Any:
    """The arguments `scales, gain, seed, p` of a kernel."""
    if not 0 <= p < 1:
        raise ValueError(f"p={p!r}: the probability of dropping must be 0 or more and below 1")
    if p > 0 and seed is None:
        raise ValueError(f"p={p!r}: dropout needs a seed; take one from draw_seed")
    if scales is not None and routing is None:
        raise ValueError("scales has a number a slot, and there is no routing; give both, or scale alone")
    return scales, float(scale) / (1 - p), seed if p > 0 else None, float(p)


def segments(routing: Routing | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if routing is None else (routing.order, routing.offsets)


def tables(routing: Routing | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if routing is None else (routing.slot, routing.first)


def rows_of(M: int, routing: Routing | None) -> int:
    """Rows of a block: few for a step of generation, 64 for a prompt or a training batch."""
    if routing is not None:
        return routing.size
    return 16 if M <= 16 else 32 if M <= 512 else 64


def blocks_of(M: int, routing: Routing | None) -> int:
    return -(-M // rows_of(M, None)) if routing is None else routing.slot.shape[0]


def columns_of(R: int) -> int:
    """Ranks of a block: a power of two of 16, the least a tensor core multiplies, or more."""
    return min(64, max(16, 1 << (R - 1).bit_length()))


def wide(x: Tensor) -> int:
    """Columns of a block of results. Float32 without tensor cores would spill more of them out of registers."""
    return 64 if x.dtype == torch.float32 else 128


def precision(x: Tensor) -> str:
    """Float32 products as torch is set to do them."""
    return "ieee" if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


class Routed(torch.autograd.Function):
    """y[i] + scales[s] (x[i] A[s]^T) B[s]^T for the slot s of each row, added in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, routing: Routing) -> Tensor:
        h = shrink_dropped(x, A, routing=routing)  # (M, r)
        expand_add_(y, h, B, scales=scales, routing=routing)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, A, B, scales)
        ctx.routing = routing
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, h, A, B, scales = ctx.saved_tensors
        (dy,) = grads  # (M, N)
        _, wants_x, wants_A, wants_B, *_ = ctx.needs_input_grad
        by = {"scales": scales, "routing": ctx.routing}
        dx = dA = dB = None
        if wants_x or wants_A:
            g = shrink_dropped(dy, B.mT, **by)  # (M, r)
        if wants_x:
            dx = expand_add_(dy.new_zeros(dy.shape[0], A.shape[2]), g, A.mT, routing=ctx.routing)  # (M, K)
        if wants_A:
            dA = outer_product(g, x, routing=ctx.routing, dtype=A.dtype)  # (S, r, K)
        if wants_B:
            dB = outer_product(h, dy, dtype=B.dtype, **by).mT  # (S, N, r)
        return dy, dx, dA, dB, None, None


def routed_add_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, routing: Routing) -> Tensor:
    """Add in place, differentiably: y[i] += scales[s] * (x[i] A[s]^T) B[s]^T for the slot s of each row.

    Args:
        y: (M, N), the base layer's output; rows of no slot are not touched.
        x: (M, K).
        A: (S, r, K). Slots of a smaller rank are padded with zeros.
        B: (S, N, r).
        scales: (S,) float32, not differentiated.
        routing: from `route`.

    Returns:
        y, to be used in place of what was given.
    """
    result: Tensor = Routed.apply(y, x, A, B, scales, routing)  # type: ignore[no-untyped-call]
    return result
