"""Low-rank adapters that differ from row to row of a batch: slots stacked into tables, and one slot for each row.

    y[i] = x[i] W^T + b + (x[i] A[s_i]^T) Bt[s_i],    A (S + 1, r, in), Bt (S + 1, r, out)

Scales are folded into Bt, smaller ranks are filled up with zeros, and the last slot is zero, for rows of the base. There
are three ways to add it, chosen by shape:

- dense: a product with all slots in use, what is not the row's own set to zero (few slots, or few rows);
- gather: each row's own slot copied, and a batched product (many tokens a row);
- grouped: rows sorted by slot, one product a slot (many rows of few tokens, many slots).

On a GPU a Triton kernel does it, where Triton is installed.

The idea of many adapters in one batch: Sheng et al. 2023, arxiv.org/abs/2311.03285 (S-LoRA); Chen et al. 2023,
arxiv.org/abs/2310.18547 (Punica).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.lazy_weight import can_group
from . import triton

if TYPE_CHECKING:
    Pair = tuple[Tensor, Tensor]

MOST = 64  # adapters that the tables kept from call to call hold; a batch with more has its own
STRATEGIES = ("dense", "gather", "grouped")


class Cost(NamedTuple):
    """What the strategies' parts cost, in microseconds.

    Attributes:
        rate: multiply-adds of a large product.
        pack: an entry of the matrix in a large product.
        copy: an entry that is copied.
        item: a matrix of a batched product.
        call: a product of its own.
    """

    rate: float
    pack: float
    copy: float
    item: float
    call: float


# Measured with one thread of a Xeon with AMX, for float32 and half precision; for a GPU, where Triton is not installed,
# after an H100's data sheet. Half precision on a CPU has dear small products: there `grouped` computes in float32.
COSTS = {
    ("cpu", 4): Cost(1e5, 1.5e-4, 3e-4, 0.9, 3.0),
    ("cpu", 2): Cost(5e5, 1.5e-4, 2e-4, 1.8, 4.0),
    ("cuda", 4): Cost(2e7, 2e-6, 4e-6, 0.02, 10.0),
    ("cuda", 2): Cost(3e8, 1e-6, 2e-6, 0.02, 10.0),
}

_forced: str | None = None


@contextmanager
def force_strategy(strategy: str) -> Iterator[None]:
    """Within the block, in every thread, use one strategy whatever the shape.

    Raises:
        ValueError: there is no such strategy.
    """
    global _forced
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: must be one of {', '.join(STRATEGIES)}")
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def choose_strategy(batch: Batch, tokens: int, r: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> str:
    """The cheapest strategy for rows of so many tokens each, adapters (r, K) and (r, N)."""
    if _forced is not None:
        return _forced
    found: str = batch.once(
        (tokens, r, K, N, dtype, device), lambda: cheapest_strategy(batch, tokens, r, K, N, dtype, device)
    )
    return found


def cheapest_strategy(
    batch: Batch, tokens: int, r: int, K: int, N: int, dtype: torch.dtype, device: torch.device
) -> str:
    kind, n, d, size = "cpu" if device.type == "cpu" else "cuda", batch.rows, len(batch.used), r * (K + N)
    cost = COSTS[kind, 2 if dtype.itemsize == 2 else 4]
    M = n * tokens
    own = M * size / cost.rate  # each token with its own slot
    dense = own * d + d * size * (cost.pack + (0 if batch.all else cost.copy)) + 2 * cost.call
    gather = own + 2 * n * cost.item + (0 if batch.in_order else n * size * cost.copy) + 2 * cost.call
    if needs_float32(dtype, device):
        cost = COSTS[kind, 4]
    moved = M * (K + 2 * N) * cost.copy + (0 if batch.all else d * size * cost.copy)
    products = 2 * d * (cost.item if batch.even else cost.call)
    grouped = M * size / cost.rate * (batch.stretch if batch.even else 1) + moved + products + 4 * cost.call
    return min(zip((dense, gather, grouped), STRATEGIES, strict=True))[1]


def needs_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `grouped` computes in float32 in place of this dtype."""
    return device.type == "cpu" and dtype.itemsize == 2


def table_dtype(strategy: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the tables for a strategy."""
    return torch.float32 if strategy == "grouped" and needs_float32(dtype, device) else dtype


class Batch:
    """The slot of each row of a batch, with what the strategies need of it. Made once, read by any thread.

    Args:
        slots: (n,) int64, the slot of each row; S for none.
        count: S.
        known: whether the slots may be looked at: not if that means waiting for a device.

    Attributes:
        used: the slots that occur, without S, in order; all of them where they are not known.
        most: of the rows of a slot.
        base: some rows have no slot.
    """

    def __init__(self, slots: Tensor, count: int, *, known: bool = True) -> None:
        self.slots, self.count, self.rows = slots, count, slots.shape[0]
        self.used: Sequence[int] = range(count)
        self.most, self.base = -(-self.rows // max(count, 1)), True
        self.in_order = False
        if known:
            self.each: list[int] = slots.tolist()
            self.used = sorted(set(self.each) - {count})
            self.most = max((self.each.count(s) for s in self.used), default=0) if self.rows <= MOST else self.counted()
            self.base = count in self.each
            self.in_order = self.each == list(range(self.rows))
        self.all = len(self.used) == count
        self.stretch = self.most * len(self.used) / self.rows  # of the batch, where all slots get as many rows
        self.even = self.stretch <= 2
        self.made: dict[Any, Any] = {}

    def counted(self) -> int:
        return int(torch.bincount(self.slots, minlength=self.count + 1)[: self.count].max())

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        found = self.made.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self.made[key] = make()
        return found

    def index(self, device: torch.device) -> Tensor:
        """The slot of each row, (n,) int64."""
        found: Tensor = self.once(("index", device), lambda: self.slots.to(device))
        return found

    def columns(self, device: torch.device) -> Tensor:
        """The slots in use, (d,) int64."""
        found: Tensor = self.once(("columns", device), lambda: torch.tensor(list(self.used), device=device))
        return found

    def mask(self, r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """1 where a column is of the row's own slot, (n, 1, d r)."""

        def make() -> Tensor:
            own = self.index(device)[:, None] == self.columns(device)  # (n, d)
            return own.to(dtype).repeat_interleave(r, 1).unsqueeze(1)

        found: Tensor = self.once((r, dtype, device), make)
        return found

    def order(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The rows sorted by slot (n,), the place of each row there (n,), and where each slot ends (S + 1,) int32."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            ordered, order = self.index(device).sort(stable=True)
            bounds = torch.arange(self.count + 1, device=device)
            return order, order.argsort(), torch.searchsorted(ordered, bounds, right=True).int()

        found: tuple[Tensor, Tensor, Tensor] = self.once(("order", device), make)
        return found

    def layout(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows slot by slot, `most` to each (d most,), any row where there are fewer; the place of each row there (n,);
        and the rows without a slot (n, 1, 1), or None.
        """

        def make() -> tuple[Tensor, Tensor, Tensor | None]:
            order, place = [0] * (len(self.used) * self.most), [0] * self.rows
            free = {s: i * self.most for i, s in enumerate(self.used)}
            for row, s in enumerate(self.each):
                if s in free:
                    order[free[s]], place[row] = row, free[s]
                    free[s] += 1
            bare = (self.index(device) == self.count)[:, None, None] if self.base else None
            return torch.tensor(order, device=device), torch.tensor(place, device=device), bare

        found: tuple[Tensor, Tensor, Tensor | None] = self.once(("layout", device), make)
        return found

    def sizes(self) -> list[int]:
        """How many rows each slot has, the last for none."""
        found: list[int] = self.once("sizes", lambda: torch.bincount(self.slots, minlength=self.count + 1).tolist())
        return found

    def routing(self, tokens: int, device: torch.device) -> tuple[Any, Tensor]:
        """The plan of the Triton kernels, and S ones."""

        def make() -> tuple[Any, Tensor]:
            slots = self.index(device)
            each = torch.where(slots < self.count, slots, -1).int().repeat_interleave(tokens)
            return triton.route_rows(each, self.count), torch.ones(self.count, device=device)

        found: tuple[Any, Tensor] = self.once(("routing", tokens, device), make)
        return found


# The strategies. Each adds to y (n, T, out), its own memory where no gradient is wanted, and returns it; x is (n, T, in).
# `used` is what `in_use` returns, where it is known.


def add_dense(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, batch: Batch, used: Pair | None = None) -> Tensor:
    n, T, K = x.shape
    A, Bt = used or in_use(A, Bt, batch)
    d, r, N = Bt.shape
    h = F.linear(x, A.reshape(d * r, K))  # (n, T, d r)
    mask = batch.mask(r, x.dtype, x.device)  # (n, 1, d r)
    Bt = Bt.reshape(d * r, N)
    if torch.is_grad_enabled():
        return torch.addmm(y.view(-1, N), (h * mask).view(n * T, -1), Bt).view(n, T, N)
    y.view(-1, N).addmm_(h.mul_(mask).view(n * T, -1), Bt)
    return y


def add_gathered(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, batch: Batch, used: Pair | None = None) -> Tensor:
    if batch.in_order:
        A, Bt = A[: batch.rows], Bt[: batch.rows]
    else:
        index = batch.index(x.device)
        A, Bt = A.index_select(0, index), Bt.index_select(0, index)
    h = torch.bmm(x, A.mT)  # (n, T, r)
    return torch.baddbmm(y, h, Bt) if torch.is_grad_enabled() else y.baddbmm_(h, Bt)


def add_grouped(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, batch: Batch, used: Pair | None = None) -> Tensor:
    n, T, K = x.shape
    if x.is_cuda and can_group(x, A.mT) and can_group(x, Bt):
        order, place, ends = batch.order(x.device)
        rows = x.index_select(0, order).view(n * T, K)
        low = F.grouped_mm(F.grouped_mm(rows, A.mT, offs=ends * T), Bt, offs=ends * T)
        low = low.view(n, T, -1).index_select(0, place)
    elif batch.even:  # the same number of rows for each slot in use
        order, place, bare = batch.layout(x.device)
        A, Bt = used or in_use(A, Bt, batch)
        rows = x if batch.in_order else x.index_select(0, order)
        h = torch.bmm(rows.to(A.dtype).view(len(batch.used), -1, K), A.mT)  # (d, most T, r)
        low = torch.bmm(h, Bt).to(y.dtype).view(-1, T, Bt.shape[2])  # (d most, T, out)
        low = low if batch.in_order else low.index_select(0, place)
        low = low if bare is None else low.masked_fill(bare, 0)
    else:
        order, place, _ = batch.order(x.device)
        rows = x.index_select(0, order).to(A.dtype).view(n * T, K)
        parts = torch.split(rows, [size * T for size in batch.sizes()])
        low = torch.cat([part @ a.mT @ b for part, a, b in zip(parts, A.unbind(), Bt.unbind(), strict=True)])
        low = low.view(n, T, -1).index_select(0, place)
    low = low.to(y.dtype)
    return y + low if torch.is_grad_enabled() else y.add_(low)


def in_use(A: Tensor, Bt: Tensor, batch: Batch) -> Pair:
    """The slots that rows have, (d, r, in) and (d, r, out)."""
    if batch.all:
        return A[: batch.count], Bt[: batch.count]
    columns = batch.columns(A.device)
    return A.index_select(0, columns), Bt.index_select(0, columns)


def runs_fused(x: Tensor) -> bool:
    """Whether a Triton kernel does all of it."""
    return _forced is None and triton.is_available(x)


ADD: dict[str, Callable[..., Tensor]] = {"dense": add_dense, "gather": add_gathered, "grouped": add_grouped}


def routed_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """Return y[i] + scales[s] * (x[i] A[s]^T) B[s]^T for the slot s of each token. Differentiable in y, x, A and B.

    Args:
        y: (M, N), such as a base layer's output.
        x: (M, K).
        A: (S, r, K). Slots of a smaller rank are filled up with zeros.
        B: (S, N, r).
        scales: (S,), not differentiated.
        slots: (M,) whole numbers, the slot of each token; -1 for none.

    Raises:
        ValueError: shapes that do not go together, or on a CPU slots that do not exist.
    """
    S, r, K = A.shape
    M, N = y.shape
    if x.shape != (M, K) or B.shape != (S, N, r) or scales.shape != (S,) or slots.shape != (M,):
        raise ValueError(
            f"routed_add: y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, scales "
            f"{tuple(scales.shape)}, slots {tuple(slots.shape)}; must be (M, N), (M, K), (S, r, K), (S, N, r), (S,), (M,)"
        )
    if not M:
        return y
    if runs_fused(x):
        return triton.routed_add_(y.clone(), x, A, B, scales.float(), triton.route_rows(slots.int(), S))
    slots = slots.long()
    host = slots.device.type == "cpu"
    if host and not torch.compiler.is_compiling():
        low, high = slots.aminmax()
        if low < -1 or high >= S:
            raise ValueError(f"routed_add: slots {int(low)} to {int(high)}; must be from 0 to {S - 1}, or -1 for none")
    batch = Batch(torch.where(slots < 0, S, slots), S, known=host or not can_group(x, A.mT))
    strategy = choose_strategy(batch, 1, r, K, N, x.dtype, x.device)
    dtype = table_dtype(strategy, x.dtype, x.device)
    A = F.pad(A.to(dtype), (0, 0, 0, 0, 0, 1))  # (S + 1, r, K)
    Bt = F.pad(B.mT * scales.detach()[:, None, None].to(B.dtype), (0, 0, 0, 0, 0, 1)).to(dtype)  # (S + 1, r, N)
    return ADD[strategy](y.clone().unsqueeze(1), x.unsqueeze(1), A, Bt, batch).squeeze(1)
