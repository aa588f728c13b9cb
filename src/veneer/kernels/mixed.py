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

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.sums import terms
from ..layers.lazy_weight import groupable
from . import triton
from .linear import accepted
from .member import Member, runs_as_linear, stored_in

if TYPE_CHECKING:
    from ..injection.dispatch import AdaptedState
    from ..injection.router import Router, Rows

    Pair = tuple[Tensor, Tensor]

STRATEGIES = ("dense", "gather", "grouped")
MOST = 64  # adapters that the tables kept from call to call hold; a batch with more has its own
BATCHES = 16  # of rows, what was found out of them is kept


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
def only(strategy: str) -> Iterator[None]:
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


def choose(batch: Batch, tokens: int, r: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> str:
    """The cheapest strategy for rows of so many tokens each, adapters (r, K) and (r, N)."""
    if _forced is not None:
        return _forced
    found: str = batch.once((tokens, r, K, N, dtype, device), lambda: cheapest(batch, tokens, r, K, N, dtype, device))
    return found


def cheapest(batch: Batch, tokens: int, r: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> str:
    kind, n, d, size = "cpu" if device.type == "cpu" else "cuda", batch.rows, len(batch.used), r * (K + N)
    cost = COSTS[kind, 2 if dtype.itemsize == 2 else 4]
    M = n * tokens
    own = M * size / cost.rate  # each token with its own slot
    dense = own * d + d * size * (cost.pack + (0 if batch.all else cost.copy)) + 2 * cost.call
    gather = own + 2 * n * cost.item + (0 if batch.in_order else n * size * cost.copy) + 2 * cost.call
    if widened(dtype, device):
        cost = COSTS[kind, 4]
    moved = M * (K + 2 * N) * cost.copy + (0 if batch.all else d * size * cost.copy)
    products = 2 * d * (cost.item if batch.even else cost.call)
    grouped = M * size / cost.rate * (batch.stretch if batch.even else 1) + moved + products + 4 * cost.call
    return min(zip((dense, gather, grouped), STRATEGIES, strict=True))[1]


def widened(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `grouped` computes in float32 in place of this dtype."""
    return device.type == "cpu" and dtype.itemsize == 2


def table_dtype(strategy: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the tables for a strategy."""
    return torch.float32 if strategy == "grouped" and widened(dtype, device) else dtype


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

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
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
            return triton.route(each, self.count), torch.ones(self.count, device=device)

        found: tuple[Any, Tensor] = self.once(("routing", tokens, device), make)
        return found


# The strategies. Each adds to y (n, T, out), its own memory where no gradient is wanted, and returns it; x is (n, T, in).
# `used` is what `in_use` returns, where it is known.


def dense(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, batch: Batch, used: Pair | None = None) -> Tensor:
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


def gather(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, batch: Batch, used: Pair | None = None) -> Tensor:
    if batch.in_order:
        A, Bt = A[: batch.rows], Bt[: batch.rows]
    else:
        index = batch.index(x.device)
        A, Bt = A.index_select(0, index), Bt.index_select(0, index)
    h = torch.bmm(x, A.mT)  # (n, T, r)
    return torch.baddbmm(y, h, Bt) if torch.is_grad_enabled() else y.baddbmm_(h, Bt)


def grouped(y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, batch: Batch, used: Pair | None = None) -> Tensor:
    n, T, K = x.shape
    if x.is_cuda and groupable(x, A.mT) and groupable(x, Bt):
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


def fused(x: Tensor) -> bool:
    """Whether a Triton kernel does all of it."""
    return _forced is None and triton.available(x)


ADD: dict[str, Callable[..., Tensor]] = {"dense": dense, "gather": gather, "grouped": grouped}


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
    if fused(x):
        return triton.routed_add_(y.clone(), x, A, B, scales.float(), triton.route(slots.int(), S))
    slots = slots.long()
    host = slots.device.type == "cpu"
    if host and not torch.compiler.is_compiling():
        low, high = slots.aminmax()
        if low < -1 or high >= S:
            raise ValueError(f"routed_add: slots {int(low)} to {int(high)}; must be from 0 to {S - 1}, or -1 for none")
    batch = Batch(torch.where(slots < 0, S, slots), S, known=host or not groupable(x, A.mT))
    strategy = choose(batch, 1, r, K, N, x.dtype, x.device)
    dtype = table_dtype(strategy, x.dtype, x.device)
    A = F.pad(A.to(dtype), (0, 0, 0, 0, 0, 1))  # (S + 1, r, K)
    Bt = F.pad(B.mT * scales.detach()[:, None, None].to(B.dtype), (0, 0, 0, 0, 0, 1)).to(dtype)  # (S + 1, r, N)
    return ADD[strategy](y.clone().unsqueeze(1), x.unsqueeze(1), A, Bt, batch).squeeze(1)


class State(NamedTuple):
    """What the tensors of adapters were when a table was made of them.

    Attributes:
        tensors: of them, parameters and others.
        versions: sum of how often they were written.
        places: sum of their addresses.
        attributes: names of the parameters on the layer.
        parameters: that had these names.
    """

    tensors: list[Tensor]
    versions: int
    places: int
    attributes: list[str]
    parameters: list[Any]


class Table(NamedTuple):
    """The adapters of one site, stacked.

    Attributes:
        names: the adapter of each slot, of which some may have nothing here.
        A: (S + 1, r, in).
        Bt: (S + 1, r, out), times the scales.
        drops: probability of dropping an entry of the input while training, for each slot, None where nothing is.
        state: of the tensors it was made from; None where changes would not be noticed.
    """

    names: tuple[str, ...]
    A: Tensor
    Bt: Tensor
    drops: tuple[float | None, ...]
    state: State | None


class Found(NamedTuple):
    """What serves one layer in one call.

    Attributes:
        names: of the slots.
        batch: the slot of each row.
        r: largest rank.
        trained: gradients go to an adapter: tables are stacked anew each time.
        tables: by their dtype, where they are not.
        used: the slots in use of each.
    """

    names: tuple[str, ...]
    batch: Batch
    r: int
    trained: bool
    tables: dict[torch.dtype, Table]
    used: dict[torch.dtype, Pair]


_LOCK = threading.Lock()


class Mixed:
    """The kernel of one linear layer whose rows have adapters of their own."""

    def __init__(self, state: AdaptedState, layer: nn.Module) -> None:
        assert state.main is not None
        self.site, self.layer, self.router = state.main, layer, state.router
        self.members: dict[str, Member | None] = {}
        self.ranks: dict[str, int] = {}
        # Rows of a call without gradients, and what served them.
        self.last: tuple[tuple[str, ...] | None, Found | None] = (None, None)

    def __call__(self, layer: nn.Module, rows: Rows, x: Tensor) -> Tensor | None:
        """The outputs for x (rows, ..., in), or None where another way has to be taken."""
        n, stored = len(rows), stored_in(layer, self.site)
        if stored is None or layer is not self.layer or x.ndim < 2 or x.shape[0] % n or not x.shape[0]:
            return None
        W, b = stored
        K, dtype = W.shape[1], accepted(x, W)
        if dtype is None:
            return None
        graded = torch.is_grad_enabled()
        found: Any = rows.found.get((self, graded), self)
        if found is self:
            found = rows.found[self, graded] = self.find(rows, graded) if graded else self.known(rows)
        if found is None:
            return None
        # Where `generate` repeats rows for its beams, they are counted among the row's tokens.
        z = x if x.dtype == dtype else x.to(dtype)
        if z.ndim != 3 or z.shape[0] != n:
            z = z.reshape(n, -1, K)  # (n, T, in)
        T, batch = z.shape[1], found.batch
        strategy = choose(batch, T, found.r, K, W.shape[0], dtype, z.device)
        table = self.table(found, table_dtype(strategy, dtype, z.device))
        if table is None:
            return None
        u = z
        if layer.training:
            drops = {table.drops[s] for s in batch.used} - {None}
            if len(drops) > 1:
                return None
            u = F.dropout(z, drops.pop() or 0.0) if drops else z
        if W.dtype != dtype:
            W = W.to(dtype)
        if b is not None and b.dtype != dtype:
            b = b.to(dtype)
        if fused(z):
            y = F.linear(z.reshape(-1, K), W, b)
            routing, ones = batch.routing(T, z.device)
            y = triton.routed_add_(y, u.reshape(-1, K), table.A[:-1], table.Bt[:-1].mT, ones, routing).view(n, T, -1)
        else:
            used = None
            if not found.trained and strategy != "gather":
                width = table.A.dtype
                used = found.used.get(width)
                if used is None:
                    with torch.inference_mode(False), torch.no_grad():
                        used = found.used[width] = in_use(table.A, table.Bt, batch)
            y = ADD[strategy](F.linear(z, W, b), u, table.A, table.Bt, batch, used)
        return y if z is x else y.view(*x.shape[:-1], y.shape[-1])

    def known(self, rows: Rows) -> Found | None:
        """What serves a call without gradients: what was found for the last such rows, if its adapters are unchanged."""
        last, found = self.last
        if last != rows:
            found = self.find(rows, False)
            self.last = tuple(rows), found  # not `rows`, which holds what it found here
        elif found is not None:
            for dtype, table in list(found.tables.items()):
                if table.state is None or not self.unchanged(table.state):
                    found.tables.pop(dtype, None)
                    found.used.pop(dtype, None)
        return found

    def find(self, rows: Rows, graded: bool) -> Found | None:
        """What serves a call, or None where an adapter of its rows is not low-rank and nothing more, or none is here."""
        here = [name for name in rows.distinct if name in self.site.entries]
        members = [self.member(name) for name in here]
        if not here or any(m is None for m in members):
            return None
        trained = graded and any(t.requires_grad for name in here for t in self.site.tensors(name).values())
        names = rows.distinct if trained else cached_adapters(self.router, rows.distinct)
        r = max(self.ranks[name] for name in here)
        return Found(names, batch_of(self.router, rows, names), r, trained, {}, {})

    def table(self, found: Found, dtype: torch.dtype) -> Table | None:
        """The adapters of a call in one table, or None where one cannot be read as it is stored now."""
        if found.trained:
            return self.stack(found.names, dtype)
        table = found.tables.get(dtype)
        if table is None:
            table = self.kept(found.names, dtype)
            if table is not None:
                found.tables[dtype] = table
        return table

    def member(self, name: str) -> Member | None:
        """An adapter's part here, None where it is not low-rank and nothing more."""
        if name not in self.members:
            member = Member(self.site, (name,))
            with torch.no_grad():
                links: Any = self.site.terms((name,))
            pure = member.plan() and all(link.left is None and link.shift is None for link in links)
            if pure:
                ops: Any = [op for link in links for op in terms(link.delta)]
                self.ranks[name] = sum(op.A.shape[0] for op in ops)
            self.members[name] = member if pure else None
        return self.members[name]

    def kept(self, names: tuple[str, ...], dtype: torch.dtype) -> Table | None:
        """The table of these adapters, for calls in which no gradient goes to them."""
        held: Table | None = self.router.kept.get((self, dtype))
        if held is not None and held.names is names and held.state is not None and self.unchanged(held.state):
            return held
        state = self.state(names)  # before the table, so that a change while it is stacked is seen
        with torch.inference_mode(False), torch.no_grad():
            table = self.stack(names, dtype)
        if table is not None:
            table = table._replace(state=state)
            self.router.kept[self, dtype] = table
        return table

    def state(self, names: tuple[str, ...]) -> State | None:
        """What tells whether these adapters have changed; None where nothing would."""
        site = self.site
        here = [name for name in names if name in site.entries]
        tensors = [t for name in here for t in site.tensors(name).values()]
        if any(map(Tensor.is_inference, tensors)) or sharded():
            return None
        attributes = [attr for name in here for _, attr in site.entries[name].trained]
        held = [site.owner._parameters[attr] for attr in attributes]
        return State(tensors, sum(map(VERSION, tensors)), sum(map(Tensor.data_ptr, tensors)), attributes, held)

    def unchanged(self, state: State) -> bool:
        """Whether the tensors of a state are those of the layer still, and as they were."""
        tensors = state.tensors
        if not all(map(is_, map(self.site.owner._parameters.get, state.attributes), state.parameters)):
            return False
        return sum(map(VERSION, tensors)) == state.versions and sum(map(Tensor.data_ptr, tensors)) == state.places

    def stack(self, names: tuple[str, ...], dtype: torch.dtype) -> Table | None:
        """The adapters in one table, or None where one cannot be read as it is stored now."""
        shares = []
        for name in names:
            member = self.member(name) if name in self.site.entries else None
            share = None if member is None else member.share()
            if member is not None and share is None:
                return None
            shares.append(share)
        there = [s for s in shares if s is not None]
        r = max(s.A.shape[0] for s in there)
        A_none, B_none = there[0].A.new_zeros(r, there[0].A.shape[1]), there[0].B.new_zeros(r, there[0].B.shape[0])
        As = [A_none if s is None else padded(s.A, r) for s in shares]  # (r, in)
        Bs = [B_none if s is None else padded(s.B.t(), r) for s in shares]  # (r, out)
        A = torch.stack([*As, A_none]).to(dtype)
        Bt = torch.stack([*Bs, B_none])
        scales = [0.0 if s is None else s.scale for s in shares]
        if any(scale != 1 for scale in scales):
            Bt = Bt * torch.tensor([*scales, 0.0], dtype=Bt.dtype, device=Bt.device)[:, None, None]
        drops = tuple(None if s is None else s.dropout for s in shares)
        return Table(names, A, Bt.to(dtype), drops, None)


VERSION = attrgetter("_version")


def padded(matrix: Tensor, rows: int) -> Tensor:
    """A matrix with rows of zeros below, to (rows, n)."""
    return matrix if matrix.shape[0] == rows else F.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))


def sharded() -> bool:
    """Whether what shards parameters may write them without counting it."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def cached_adapters(router: Router, names: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters that the tables hold: those of the batches so far, in the order in which they came."""
    held: tuple[str, ...] = router.kept.get("crew", ())
    known = set(held)
    if known.issuperset(names):
        return held
    both = (*held, *(n for n in names if n not in known))
    router.kept["crew"] = both = both if len(both) <= MOST else names
    return both


def batch_of(router: Router, rows: Rows, names: tuple[str, ...]) -> Batch:
    """The rows' slots in tables of `names`, found once for all layers."""
    key = (tuple(rows), names)
    with _LOCK:
        batches: dict[Any, Batch] = router.kept.setdefault("batches", {})
        batch = batches.pop(key, None)
        if batch is None:
            slots = {name: i for i, name in enumerate(names)}
            each = [slots.get(name, len(names)) for name in rows]
            with torch.inference_mode(False):
                batch = Batch(torch.tensor(each), len(names))
            for old in list(itertools.islice(batches, max(0, len(batches) - BATCHES + 1))):
                del batches[old]
        batches[key] = batch  # the last one used
    return batch


def kernel_of(state: AdaptedState, layer: nn.Module) -> Mixed | None:
    """The kernel for the rows of a layer, or None."""
    if state.main is None or not state.only_kernel or not runs_as_linear(state) or "_hf_hook" in layer.__dict__:
        return None
    return Mixed(state, layer)
