"""Slots: room on a model for low-rank adapters that come and go while it serves, compiled or not.

A slot is one row of one tensor, with a part for A and B of every layer, filled up with zeros to the largest rank. So an
adapter that was packed before is loaded by one copy, and nothing that a compiled forward depends on changes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .. import layers
from ..algebra.low_rank import Factored
from ..algebra.recursion import Term
from ..algebra.sums import Sum, terms_of
from ..backends import backend_of
from ..distributed import sharding
from ..injection.class_swap import adapt_class, restore_class
from ..injection.dispatch import AdaptedState
from ..injection.entries import term_of
from ..io import locate
from ..kernels.routed import Batch
from ..lifecycle.adapters import ATTRIBUTE
from ..lifecycle.attach import freeze_base
from ..lifecycle.keys import PREFIX
from ..lifecycle.plan import check_name
from ..methods.base import PeftConfig
from ..targets import select, suggest
from ..targets.query import TargetQuery, as_names
from .slotted_layer import A_NAME, B_NAME, COUNT, INDEX, Slotted

if TYPE_CHECKING:
    from ..lifecycle.adapters import Runtime
    from ..lifecycle.find_sites import PlannedSite
    from ..methods.base import Method

    Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | Packed"

BASE = "__base__"
ROWS = 256  # rows of a batch that can be told apart without another compilation, unless said otherwise


class Part(NamedTuple):
    """Where a layer's share of a slot is: A (R, in) from `start`, B (R, out) behind it."""

    name: str
    fan_in: int
    fan_out: int
    start: int


@dataclass(frozen=True)
class Packed:
    """An adapter as it lies in a slot: `values` (numbers of a slot,), for slots of the same `layout`."""

    values: Tensor
    layout: tuple[Any, ...]

    def to(self, device: Any) -> Packed:
        """The same on another device."""
        return Packed(self.values.to(device), self.layout)

    def pin_memory(self) -> Packed:
        """The same in memory from which a GPU copies fast."""
        return Packed(self.values.pin_memory(), self.layout)


class Setting:
    """A choice that holds from now on; as a context manager, until the end of the block."""

    def __init__(self, slots: Slots, before: tuple[str | None, ...] | None) -> None:
        self.slots, self.before = slots, before

    def __enter__(self) -> Slots:
        return self.slots

    def __exit__(self, *error: object) -> None:
        self.slots.choose(self.before)


class Slots:
    """Slots for low-rank adapters on the linear layers of one model. Made by `PeftModel.reserve_slots`.

    An adapter in a slot acts on a layer's output after all others; `disable_adapter` leaves it out. What is chosen holds
    for all threads. Slots are not trained, and not saved: keep the adapter's folder. Move the model to its device before.

    Args:
        runtime: the model's.
        max_adapters: S, how many there is room for.
        max_rank: R, the largest rank.
        dtype: of the slots; None for that of the first layer's weight.
        target_modules: names, a regular expression or "all-linear": the layers that get slots.
        max_rows: rows of a batch that can be told apart.

    Raises:
        ValueError: there are slots already; numbers below 1; targets that are no linear layers, or on several devices.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_adapters: int,
        max_rank: int,
        dtype: torch.dtype | None = None,
        target_modules: str | Collection[str] = select.ALL_LINEAR,
        max_rows: int = ROWS,
    ) -> None:
        for what, number in (("max_adapters", max_adapters), ("max_rank", max_rank), ("max_rows", max_rows)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"reserve_slots({what}={number!r}): must be a whole number of 1 or more")
        if slots_of(runtime) is not None:
            raise ValueError("this model has slots already; call their release() first")
        sharding.refuse_attaching(runtime.root, dict(runtime.root.named_modules()))
        self.runtime, self.root = runtime, runtime.root
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.held: dict[str, int] = {}  # adapter -> slot
        self.chosen: tuple[str | None, ...] | None = None  # of each row; one for all; None for none
        self.now: int | Batch | None = None  # the same, as slots
        query = TargetQuery(target_modules=as_names(target_modules), asked_by="reserve_slots")
        named = select.resolve_targets(self.root, query, supported=can_hold_slots, allowed="linear layers").modules
        self.parts: dict[str, Part] = {}
        start, weight = 0, None
        for name in named:
            layer = self.root.get_submodule(name)
            kind = layers.kind_of(layer)
            assert kind is not None
            param = kind.weight_of(layer)
            geometry, backend = kind.measure(layer, param), backend_of(layer, param, name)
            here = backend.storage(layer, param)
            if isinstance(self.root.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
                raise ValueError(f"{name}: nn.MultiheadAttention never calls this layer, so it has no output to add to")
            weight = here if weight is None else weight
            dtype = backend.dtype(layer, param) if dtype is None else dtype
            if here.device != weight.device or here.device.type == "meta":
                raise ValueError(
                    f"{name} is on {here.device} and {named[0]} on {weight.device}; slots need all layers on one device"
                )
            self.parts[name] = Part(name, geometry.fan_in, geometry.fan_out, start)
            start += max_rank * (geometry.fan_in + geometry.fan_out)
        assert weight is not None
        self.flat = torch.zeros(max_adapters + 1, start, dtype=dtype, device=weight.device)  # (S + 1, numbers)
        for name in self.parts:
            state = adapt_class(self.root.get_submodule(name), runtime.router)
            state.__class__ = Slotted
            state.slots = self  # type: ignore[attr-defined]
        self.show()
        self.hold(INDEX, torch.full((max_rows,), max_adapters, device=weight.device))
        self.hold(COUNT, torch.ones((), dtype=torch.int64, device=weight.device))
        freeze_base(runtime)
        runtime.on_unload.append(self.release)
        runtime.router.changed()

    def hold(self, name: str, value: Tensor, module: nn.Module | None = None) -> None:
        """Put a buffer where a compiled forward takes it as an input, and no file as a weight."""
        module = self.root if module is None else module
        module._buffers[name] = value
        module._non_persistent_buffers_set.add(name)

    def show(self) -> None:
        """Give each layer its part of all slots."""
        for part in self.parts.values():
            A, B = self.views(self.flat, part)
            layer = self.root.get_submodule(part.name)
            self.hold(A_NAME, A, layer)
            self.hold(B_NAME, B, layer)

    def views(self, rows: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """A (..., R, in) and B (..., R, out) of a layer in rows (..., numbers)."""
        R, middle = self.max_rank, part.start + self.max_rank * part.fan_in
        A, B = rows[..., part.start : middle], rows[..., middle : middle + R * part.fan_out]
        return A.view(*rows.shape[:-1], R, part.fan_in), B.view(*rows.shape[:-1], R, part.fan_out)

    def settle(self) -> None:
        """Make the slots one tensor again after the model was moved, cast or unpickled."""
        first = next(iter(self.parts.values()))
        shown = self.root.get_submodule(first.name)._buffers[A_NAME]
        assert shown is not None
        if shown.data_ptr() == self.flat.data_ptr() and shown.dtype == self.flat.dtype:
            return
        self.flat = torch.empty(self.flat.shape, dtype=shown.dtype, device=shown.device)
        for part in self.parts.values():
            held = self.root.get_submodule(part.name)._buffers
            for own, moved in zip(self.views(self.flat, part), (held[A_NAME], held[B_NAME]), strict=True):
                own.copy_(moved)  # type: ignore[arg-type]
        self.show()

    # Adapters come and go.

    @property
    def names(self) -> list[str]:
        """The adapters in the slots."""
        return list(self.held)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What slots must have in common for a packed adapter to fit both."""
        return self.max_rank, self.flat.dtype, tuple(self.parts.values())

    def pack(self, source: Source, config: Method | None = None) -> Packed:
        """Read an adapter into memory as it lies in a slot, on the CPU.

        Args:
            source: a folder or hub id, or tensors by their key in the file.
            config: of the adapter, where `source` is tensors.

        Raises:
            ValueError: a method that is not low-rank, a larger rank than there is room for, a layer without slots.
            AdapterLoadError: the file does not fit its config.
            TypeError: tensors without a config.
        """
        if isinstance(source, Packed):
            return source
        if isinstance(source, Mapping):
            if config is None:
                raise TypeError("tensors alone do not say their scale; pass config=LoraConfig(...) with them")
            tensors = dict(source)
        else:
            config = PeftConfig.from_pretrained(source) if config is None else config
            tensors = locate.load_weights(source)
        bare = not any(key.startswith(PREFIX) for key in tensors)
        drafted = self.runtime.planner("slot", tensors=tensors, prefix="" if bare else PREFIX).plan_adapter(config)
        if drafted.overrides:
            raise ValueError(
                f"{min(drafted.overrides)}: the file brings weights of the base model, and a slot has no room for them; load "
                "it with load_adapter"
            )
        values = torch.zeros(self.flat.shape[1], dtype=self.flat.dtype)
        for place in drafted.sites:
            A, B = self.factors(place, drafted.shared)  # (r, in), (r, out)
            for room, factor in zip(self.views(values, self.parts[place.site.name]), (A, B), strict=True):
                room[: factor.shape[0]].copy_(factor)
        return Packed(values, self.layout)

    def factors(self, place: PlannedSite, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (r, out), with its scale, of what an adapter says at a place."""
        site, entry, method = place.site, place.entry, place.entry.method
        refusal = f"{site.name}: {method.peft_name} is no low-rank matrix added to the weight of a linear layer here"
        if not place.is_layer or site.kind.own_forward() is None:
            raise ValueError(f"{refusal}, which is all that a slot can hold; load it with load_adapter")
        p = {k: place.values[attr] for k, attr in (*entry.trained, *entry.frozen)} | {
            k: shared[k] for k in entry.shared
        }
        with torch.no_grad():
            said: Term = term_of(method, p, site)
            ops = () if said.delta is None else terms_of(said.delta)
            pure = all(x is None for x in (said.left, said.right, said.shift, said.post))
            if not pure or not ops or not all(isinstance(op, Factored) and op.groups == 1 for op in ops):
                raise ValueError(f"{refusal}, which is all that a slot can hold; load it with load_adapter")
            both: Any = Sum(*ops).joined()
        if site.name not in self.parts:
            raise ValueError(f"{site.name}: this layer has no slots; name it in reserve_slots(target_modules=...)")
        if both.A.shape[0] > self.max_rank:
            raise ValueError(
                f"{site.name}: the adapter's rank is {both.A.shape[0]}, and max_rank is {self.max_rank}; reserve slots of a "
                "larger rank"
            )
        return both.A, both.B.t()

    def load(self, name: str, source: Source, config: Method | None = None) -> None:
        """Put an adapter into a free slot. It is not used yet.

        Args:
            name: its name among the slots.
            source: a folder or hub id, tensors by their key in the file, or what `pack` returned.
            config: of the adapter, where `source` is tensors.

        Raises:
            ValueError: a name that is taken or not allowed; no slot is free; and as `pack`.
        """
        check_name(name, self.held)
        free = sorted(set(range(self.max_adapters)) - set(self.held.values()))
        if not free:
            raise ValueError(
                f"all {self.max_adapters} slots are taken, by {', '.join(map(repr, self.held))}; unload one, swap it, or "
                "reserve more (max_adapters)"
            )
        self.write(free[0], source, config)
        self.held[name] = free[0]

    def swap(self, name: str, source: Source, config: Method | None = None) -> None:
        """Replace the adapter in a slot by another, under the same name; arguments and errors as of `load`."""
        self.write(self.slot(name), source, config)

    def unload(self, name: str) -> None:
        """Free a slot. Rows that use it go on with the base."""
        slot = self.slot(name)
        self.settle()
        self.flat[slot].zero_()
        if self.chosen is not None and name in self.chosen:
            self.choose(tuple(None if n == name else n for n in self.chosen))
        del self.held[name]

    def slot(self, name: str) -> int:
        if name not in self.held:
            there = ", ".join(map(repr, self.held)) or "none"
            raise ValueError(
                f"no adapter in a slot is named {name!r}; there are {there}{suggest.suggest(name, self.held)}"
            )
        return self.held[name]

    @torch.no_grad()
    def write(self, slot: int, source: Source, config: Method | None) -> None:
        self.settle()
        packed = self.pack(source, config)
        if packed.layout != self.layout:
            raise ValueError(
                "the adapter was packed for slots of another rank, dtype or model; pack it again with these"
            )
        self.flat[slot].copy_(packed.values, non_blocking=True)

    # Which are used.

    def use(self, name: str | None) -> Setting:
        """Use one adapter for all rows, or None for the base, from now on or within `with`."""
        return self.chose((None if name == BASE else name,))

    def rows(self, names: Sequence[str | None]) -> Setting:
        """Use an adapter of its own for each row, "__base__" or None for the base, from now on or within `with`.

        Args:
            names: as many as the batch has rows; a multiple of them may come, where `generate` repeats rows for beams.

        Raises:
            ValueError: an unknown name, no rows, or more than `max_rows`.
        """
        most = len(self.root._buffers[INDEX])  # type: ignore[arg-type]
        if isinstance(names, str) or not 0 < len(names) <= most:
            raise ValueError(
                f"rows({names!r}): must be a list of 1 to {most} names; reserve_slots(max_rows=...) says how many"
            )
        return self.chose(tuple(None if n == BASE else n for n in names))

    def chose(self, chosen: tuple[str | None, ...]) -> Setting:
        before = self.chosen
        self.choose(chosen)
        return Setting(self, before)

    @torch.no_grad()
    def choose(self, chosen: tuple[str | None, ...] | None) -> None:
        """Take up a choice, of one adapter or of one a row; None for none."""
        S = self.max_adapters
        each = [S if n is None else self.slot(n) for n in chosen or (None,)]
        index, count = self.root._buffers[INDEX], self.root._buffers[COUNT]
        assert index is not None and count is not None
        with torch.inference_mode(False):
            slots = torch.tensor(each)
            index[: len(each)].copy_(slots)
            count.fill_(len(each))
            batch = Batch(slots, S)
        self.chosen = chosen
        if len(set(each)) > 1:
            self.now = batch
        else:
            self.now = None if each[0] == S else each[0]

    def release(self) -> None:
        """Take the slots off the model."""
        for name in self.parts:
            layer = self.root.get_submodule(name)
            state = layer.__dict__["_veneer"]
            state.__class__ = AdaptedState
            del state.slots
            self.drop(layer, A_NAME, B_NAME)
            if not state.in_use:
                restore_class(layer)
        self.drop(self.root, INDEX, COUNT)
        self.runtime.on_unload.remove(self.release)
        self.runtime.router.changed()
        if not self.runtime.configs and self.root.__dict__.get(ATTRIBUTE) is self.runtime:
            del self.root.__dict__[ATTRIBUTE]

    def drop(self, module: nn.Module, *names: str) -> None:
        for name in names:
            del module._buffers[name]
            module._non_persistent_buffers_set.discard(name)


def slots_of(runtime: Runtime) -> Slots | None:
    """The slots on a model, or None."""
    owners = (getattr(release, "__self__", None) for release in runtime.on_unload)
    return next((owner for owner in owners if isinstance(owner, Slots)), None)


def can_hold_slots(module: nn.Module) -> bool:
    """Whether a module is a linear layer."""
    kind = layers.kind_of(module)
    return kind is not None and kind.own_forward() is not None


def reserve_slots(model: nn.Module, **options: Any) -> Slots:
    """Slots on a base model, with or without adapters. It is frozen if it has none. See `Slots` for the options."""
    from ..lifecycle.adapters import Runtime

    return Slots(Runtime.ensure(model), **options)
