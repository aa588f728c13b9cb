"""Dropout masks of one bit an element.

16 elements are drawn at once: one of the 65,536 patterns of 16 bits, with the probability that 16 independent draws
give it, by Walker's alias method (Walker 1977, doi.org/10.1145/355744.355749). One random int64 has the column of the
alias table in its low 16 bits and the threshold in the other 48. Drawing takes a tenth of the time of `bernoulli_` on
a CPU, and the mask is kept in backward as it is: M K / 8 bytes.

Where Triton's kernels run, a seed stands for the mask and takes its place everywhere: they draw the mask again inside
the products that need it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import scratch, triton

BITS = 16
_WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # bits of an element


def mask_for(x: Tensor, p: float) -> Tensor:
    """What stands for a mask of x (M, in): a seed (1,) int64 where Triton runs, and else the packed mask."""
    return triton.draw_seed(x.device) if triton.is_available(x) else draw_mask(x.shape[0], x.shape[1], p, x.device)


def draw_mask(rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """A packed mask (rows, ceil(columns / 16)) int16 whose bits are 1 with probability 1 - p, independently.

    It is drawn from torch's generator of the device, so `torch.manual_seed` and gradient checkpointing govern it.
    """
    words = -(-columns // BITS)
    n = rows * words
    drawn, column, found = (scratch.take_buffer(f"drawn {i}", (n,), torch.int64, device) for i in range(3))
    drawn.random_(-(2**63), None)
    torch.bitwise_and(drawn, 2**BITS - 1, out=column)
    torch.index_select(mask_table(p, device), 0, column, out=found)
    alias = torch.ge(
        drawn, found, out=scratch.take_buffer("alias", (n,), torch.bool, device)
    )  # the low bits decide nothing
    found -= column
    found *= alias
    column += found  # the alias, or the column itself, in the low 16 bits
    return column.to(torch.int16).view(rows, words)


@functools.lru_cache(maxsize=32)
def mask_table(p: float, device: torch.device) -> Tensor:
    """Walker's table of the patterns (65536,) int64: thresholds in the upper 48 bits, signed, and aliases below."""
    size = 2**BITS
    patterns = torch.arange(size, device="cpu")  # not where `torch.device(...)` says
    ones = torch.stack([(patterns >> bit) & 1 for bit in range(BITS)]).sum(0).double()
    share = ((1 - p) ** ones * p ** (BITS - ones) * size).tolist()  # mean 1
    small = [i for i, s in enumerate(share) if s < 1]
    large = [i for i, s in enumerate(share) if s >= 1]
    keep, alias = [1.0] * size, list(range(size))
    while small and large:
        low, high = small.pop(), large[-1]
        keep[low], alias[low] = share[low], high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    limit = (torch.tensor(keep, dtype=torch.float64, device="cpu") * 2**48).round().long() - 2**47
    limit = limit.clamp(max=2**47 - 1)  # a column that is always kept has itself as alias
    return ((limit << BITS) + torch.tensor(alias, device="cpu")).to(device)


def spread_bits(mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A packed mask as (rows, columns) words of the size of `dtype`, all ones where it keeps and all zeros elsewhere."""
    size = dtype.itemsize * 8
    word = _WORDS[size]
    wide = mask if word is torch.int16 else mask.to(word)
    shifts = _shifts(size - BITS, word, mask.device)  # (16,): moves a bit to the sign
    if columns % BITS:
        words = (wide[:, :, None] << shifts).view(mask.shape[0], -1)[:, :columns].contiguous()
    else:  # bit j is for column j * columns / 16 and on
        words = scratch.take_buffer("words", (mask.shape[0], BITS, mask.shape[1]), word, mask.device)
        torch.bitwise_left_shift(wide[:, None], shifts[:, None], out=words)
        words = words.view(-1, columns)
    words >>= size - 1
    return words


@functools.lru_cache(maxsize=32)
def _shifts(least: int, word: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(least, least + BITS, dtype=word, device=device)


# Products with what dropout leaves of x, some rows at a time: the dropped copy stays in the cache, and fresh pages of
# memory, which cost more than the arithmetic, are not asked for.


def rows_of(x: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of x, room for as many, and the same room as words."""
    some = x[part].contiguous()
    room = scratch.buffer_like("rows", some)
    return some, room, room.view(_WORDS[x.element_size() * 8])


def shrink_dropped(mask: Tensor, x: Tensor, A: Tensor, p: float) -> Tensor:
    """X (M, in), dropped with probability p, times A^T for A (r, in): (M, r). `mask` is what `mask_for` gave."""
    if mask.dtype is torch.int64:
        return triton.shrink_dropped(x, A, 1 - p, p=p, seed=mask)
    h = x.new_empty(x.shape[0], A.shape[0])
    for part in scratch.row_chunks(x):
        some, room, words = rows_of(x, part)
        torch.bitwise_and(spread_bits(mask[part], x.shape[1], x.dtype), some.view(words.dtype), out=words)
        torch.mm(room, A.t(), out=h[part])
    return h


def pull_gradient(mask: Tensor, gh: Tensor, x: Tensor | None, A: Tensor, dx: Tensor | None, p: float) -> Tensor | None:
    """Backward of `shrink` for gh (M, r): the gradient of A, if x (M, in) is given, and that of x, added to dx."""
    if mask.dtype is torch.int64:
        if dx is not None:
            triton.expand_add_(dx, gh, A.t(), 1 - p, p=p, seed=mask)
        return None if x is None else triton.outer_product(gh, x, 1 - p, p=p, seed=mask)
    wide = torch.promote_types(A.dtype, torch.float32)  # many parts are added
    dA = None if x is None else gh.new_zeros(A.shape, dtype=wide)
    like = dx if x is None else x
    if like is None:
        return None
    for part in scratch.row_chunks(like):
        some, room, words = rows_of(like, part)
        kept = spread_bits(mask[part], A.shape[1], A.dtype)
        if dA is not None:
            torch.bitwise_and(kept, some.view(words.dtype), out=words)
            if wide is A.dtype:
                dA.addmm_(gh[part].t(), room)
            else:
                dA += gh[part].t() @ room
        if dx is not None:
            torch.mm(gh[part], A, out=room)
            words &= kept
            dx[part] += room
    return None if dA is None else dA.to(A.dtype)
