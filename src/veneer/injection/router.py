"""Which adapters act, in which order and how combined. One router per model, shared by every site.

Switching is an assignment of one tuple, however many sites there are. A choice made for one thread, with
`choose`, wins over the model's own, so that threads can generate with different adapters on one model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

AdapterExpr: TypeAlias = "str | CombinedExpr"  # an adapter, or several that act side by side


@dataclass(frozen=True)
class CombinedExpr:
    """Branches of adapters that all see the same input; their weighted changes are added: f + sum_i w_i (f_i - f).

    A branch is a stack: one or more items in order. Immutable, so that it can be a part of what is active.
    """

    branches: tuple[tuple[AdapterExpr, ...], ...] = field(init=False)
    weights: tuple[float, ...] = field(init=False)

    def _fill(self, adapters: Sequence[Any], weights: Sequence[float]) -> None:
        object.__setattr__(self, "branches", tuple(as_stack(a) for a in adapters))
        object.__setattr__(self, "weights", tuple(weights))
        names = list(adapter_names([self]))
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"{self!r}: adapter {min(twice)!r} is named twice; name it once, with a weight in Average")

    def __repr__(self) -> str:
        shown = [repr(b[0]) if len(b) == 1 else repr(list(b)) for b in self.branches]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Parallel(CombinedExpr):
    """Adapters side by side: each changes the same output of the base, and the changes are summed.

    Args:
        *adapters: names; a list is a stack; `Parallel` and `Average` nest.

    Raises:
        ValueError: fewer than two branches, or an adapter named twice.
    """

    def __init__(self, *adapters: object) -> None:
        _refuse_single(self, adapters)
        self._fill(adapters, [1.0] * len(adapters))


@dataclass(frozen=True, repr=False)
class Average(CombinedExpr):
    """As `Parallel`, with the weighted mean of the changes in place of their sum.

    Args:
        *adapters: names; a list is a stack; `Parallel` and `Average` nest.
        weights: one number an adapter, 0 or more; divided by their sum. None weighs all alike.

    Raises:
        ValueError: fewer than two branches, an adapter named twice, or weights that are no weights.
    """

    def __init__(self, *adapters: object, weights: Sequence[float] | None = None) -> None:
        _refuse_single(self, adapters)
        given = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
        if len(given) != len(adapters) or not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) <= 0:
            raise ValueError(
                f"Average(weights={weights!r}): must be {len(adapters)} numbers of 0 or more that are not all 0, one for "
                "each adapter"
            )
        self._fill(adapters, [w / sum(given) for w in given])


def _refuse_single(made: CombinedExpr, adapters: Sequence[Any]) -> None:
    if len(adapters) < 2:
        raise ValueError(f"{type(made).__name__}{tuple(adapters)!r}: name two adapters or more")


def as_stack(chosen: object) -> tuple[AdapterExpr, ...]:
    """What a user chose, as a stack: a name, a `Parallel` or `Average`, or a list of these in order.

    Raises:
        TypeError: anything else.
    """
    items = (chosen,) if isinstance(chosen, (str, CombinedExpr)) else chosen
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, (str, CombinedExpr)) for i in items):
        raise TypeError(f"{chosen!r}: name an adapter, or give Parallel(...), Average(...) or a list of these")
    return tuple(items)


def adapter_names(items: Iterable[AdapterExpr]) -> Iterator[str]:
    """The names in a stack, from first to last."""
    for item in items:
        if isinstance(item, str):
            yield item
        else:
            for branch in item.branches:
                yield from adapter_names(branch)


class Shared(nn.Module):
    """Tensors that all sites of an adapter share: parameters of the base model if they are trained, else buffers."""

    def put(self, adapter: str, name: str, value: Tensor) -> None:
        if isinstance(value, nn.Parameter):
            self._parameters[f"{name}:{adapter}"] = value
        else:
            self.register_buffer(f"{name}:{adapter}", value, persistent=False)  # the codec saves them

    def get(self, adapter: str, name: str) -> Tensor:
        key = f"{name}:{adapter}"
        found = self._parameters[key] if key in self._parameters else self._buffers[key]
        assert found is not None
        return found

    def trained(self, adapter: str) -> list[nn.Parameter]:
        return [p for k, p in self._parameters.items() if p is not None and k.endswith(f":{adapter}")]

    def drop(self, adapter: str) -> None:
        for table in (self._buffers, self._parameters):
            for key in [k for k in table if k.endswith(f":{adapter}")]:
                del table[key]


class Rows(tuple[str, ...]):
    """The adapter of each row of a batch, for one call.

    Attributes:
        distinct: the adapters among them, without the base.
        found: what kernels found out for this call, in which adapters do not change.
    """

    distinct: tuple[str, ...]
    found: dict[Any, Any]

    def __new__(cls, names: Iterable[str]) -> Rows:
        made = super().__new__(cls, names)
        made.distinct, made.found = tuple(n for n in dict.fromkeys(made) if n != "__base__"), {}
        return made


class Scope:
    """One call of a module whose forward calls several adapted layers on one input.

    Attributes:
        parent: the module.
        waiting: results that a layer computed for its siblings, dropped at the end of the call.
    """

    __slots__ = ("parent", "waiting")

    def __init__(self, parent: nn.Module) -> None:
        self.parent = parent
        self.waiting: list[Any] = []

    def close(self) -> None:
        for pending in self.waiting:
            pending.x = None
            pending.ys = []


class Local(threading.local):
    """What holds for one thread. In each it is set on the object, as torch.compile asks whether it is."""

    def __init__(self) -> None:
        self.chosen: tuple[AdapterExpr, ...] | None = None
        self.rows: Rows | None = None
        self.tasks: Tensor | None = None
        self.whole = False
        self.scope: Scope | None = None  # the call of a parent of several layers that share an input
        # What serves the single tokens of each kernel, while no parameter changes.
        self.decoding: dict[Any, Callable[[Tensor], Tensor | None]] | None = None


class Router:
    """The active adapters of one model.

    Attributes:
        chosen: the active stack: names, and adapters combined side by side, whether or not they are disabled.
        active: the names in it.
        merged: what of it is baked into the base weights, in order.
        enabled: False inside `disable_adapter`.
        shared: state shared between sites.
        version: another object whenever adapters were added or removed, so that plans made before are void.
        kept: what kernels keep for rows of different adapters, until adapters are added or removed.
    """

    def __init__(self) -> None:
        self.chosen: tuple[AdapterExpr, ...] = ()
        self.merged: tuple[AdapterExpr, ...] = ()
        self.enabled = True
        self.shared = Shared()
        self.local = Local()
        self.stack: tuple[AdapterExpr, ...] = ()
        self.version = object()
        self.kept: dict[Any, Any] = {}
        self.runtime: Callable[[], Any] = lambda: None  # whose router it is
        self.planner: Any = None  # chooses kernels; attaching installs it

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(adapter_names(self.chosen))

    def live(self) -> tuple[AdapterExpr, ...]:
        """The stack that a forward must apply now: chosen for this thread, or active; without what is merged."""
        chosen = self.local.chosen
        return self.stack if chosen is None else chosen

    def changed(self) -> None:
        """Say that adapters were added or removed."""
        self.version, self.kept = object(), {}

    def rows(self) -> Rows | None:
        """The adapter of each row of the batch, chosen for this thread, or None where all rows have the live ones."""
        return self.local.rows

    def tasks(self) -> Tensor | None:
        """The task of each row (batch,), for adapters that hold several, or None."""
        return self.local.tasks

    def whole(self) -> bool:
        """Whether virtual positions stay in what the stacks return, for an objective that needs them."""
        return self.local.whole

    def set(
        self,
        active: tuple[AdapterExpr, ...] | None = None,
        *,
        merged: tuple[AdapterExpr, ...] | None = None,
        enabled: bool | None = None,
    ) -> None:
        """Change any of the three; the sites see it on their next forward."""
        if active is not None:
            self.chosen = active
        if merged is not None:
            self.merged = merged
        if enabled is not None:
            self.enabled = enabled
        if not self.enabled:
            self.stack = ()
        else:
            self.stack = tuple(n for n in self.chosen if n not in self.merged) if self.merged else self.chosen

    @contextmanager
    def choose(self, names: tuple[AdapterExpr, ...]) -> Iterator[None]:
        """Within the block and in this thread only, apply `names` instead of the active adapters."""
        with self.hold(chosen=names):
            yield

    @contextmanager
    def hold(self, **choices: object) -> Iterator[None]:
        """Within the block and in this thread only, hold `chosen`, `rows`, `tasks`, `whole` or `decoding`."""
        before = {name: getattr(self.local, name) for name in choices}
        for name, value in choices.items():
            setattr(self.local, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.local, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("local", "version", "kept", "runtime")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local, self.version, self.kept = Local(), object(), {}
