"""Runs a layer with low-rank adapters that differ from row to row; see `routed` for how they are added."""

from __future__ import annotations

import itertools
import threading
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.sums import terms_of
from . import triton
from .linear import accepted_dtype
from .member import Member, runs_as_linear, stored_in
from .routed import ADD, MOST, Batch, choose_strategy, in_use, runs_fused, table_dtype

if TYPE_CHECKING:
    from ..injection.dispatch import AdaptedState
    from ..injection.router import Router, Rows

    Pair = tuple[Tensor, Tensor]

BATCHES = 16  # of rows, what was found out of them is kept


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
        K, dtype = W.shape[1], accepted_dtype(x, W)
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
        strategy = choose_strategy(batch, T, found.r, K, W.shape[0], dtype, z.device)
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
        if runs_fused(z):
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
                ops: Any = [op for link in links for op in terms_of(link.delta)]
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
        if any(map(Tensor.is_inference, tensors)) or is_sharded_table():
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
        As = [A_none if s is None else pad_rows(s.A, r) for s in shares]  # (r, in)
        Bs = [B_none if s is None else pad_rows(s.B.t(), r) for s in shares]  # (r, out)
        A = torch.stack([*As, A_none]).to(dtype)
        Bt = torch.stack([*Bs, B_none])
        scales = [0.0 if s is None else s.scale for s in shares]
        if any(scale != 1 for scale in scales):
            Bt = Bt * torch.tensor([*scales, 0.0], dtype=Bt.dtype, device=Bt.device)[:, None, None]
        drops = tuple(None if s is None else s.dropout for s in shares)
        return Table(names, A, Bt.to(dtype), drops, None)


VERSION = attrgetter("_version")


def pad_rows(matrix: Tensor, rows: int) -> Tensor:
    """A matrix with rows of zeros below, to (rows, n)."""
    return matrix if matrix.shape[0] == rows else F.pad(matrix, (0, 0, 0, rows - matrix.shape[0]))


def is_sharded_table() -> bool:
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
