"""An adapter at a site: its method, its tensors and its term of the recursion."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..algebra.recursion import Branches, Term
from ..distributed import tensor_parallel
from ..distributed.sharding import is_distributed
from ..layers.kind import LayerKind
from ..layers.site import Site
from .router import AdapterExpr, CombinedExpr, Router

if TYPE_CHECKING:
    from ..methods.base import Method


class AdapterAtSite:
    """One adapter's share of one site: its method there and where its tensors are."""

    __slots__ = ("frozen", "key", "method", "names", "original", "saved", "serial", "shared", "trained")
    made = itertools.count()

    def __init__(self, method: Method, key: str, names: Mapping[str, str]) -> None:
        self.method, self.key, self.names = method, key, names
        self.original = method  # `method` may be given another scale at this site
        self.trained: tuple[tuple[str, str], ...] = ()  # the method's key -> attribute of the owner
        self.frozen: tuple[tuple[str, str], ...] = ()
        self.shared: tuple[str, ...] = ()
        self.serial = next(AdapterAtSite.made)  # tells it from an adapter of the same name that was deleted
        self.saved = True  # False where the tensors are another site's


def term_of(method: Method, p: Mapping[str, Tensor], site: Site) -> Term:
    """Ask a method for its operators; only the hooks it overrides are called."""
    hooks = method.hooks
    return Term(
        method.delta(p, site) if "delta" in hooks else None,
        method.left(p, site) if "left" in hooks else None,
        method.right(p, site) if "right" in hooks else None,
        method.shift(p, site) if "shift" in hooks else None,
        (lambda x, y: method.post(p, site, x, y)) if "post" in hooks else None,
    )


def copy_name(adapter: str) -> str:
    """Name under which an adapter's full copy of a module is registered on that module."""
    return f"copy:{adapter}"


class AdaptedSite(Site):
    """A site with the adapters that it has.

    Attributes:
        router: which adapters of the model act.
        entries: adapter name -> its share of this site.
    """

    def __init__(
        self, name: str, key: str, owner: nn.Module, param: str, kind: LayerKind, backend: object, router: Router
    ) -> None:
        super().__init__(name, key, owner, param, kind, backend)
        self.router = router
        self.entries: dict[str, AdapterAtSite] = {}

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """The adapter's tensors here, trained, frozen and shared, under the method's own keys."""
        entry = self.entries[adapter]
        params, buffers = self.owner._parameters, self.owner._buffers
        p: dict[str, Any] = {key: params[attr] for key, attr in entry.trained}
        for key, attr in entry.frozen:
            p[key] = buffers[attr]
        for key in entry.shared:
            p[key] = self.router.shared.get(adapter, key)
        return p

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """What is trained of the adapter here, under the method's own keys."""
        held = self.owner._parameters
        return {key: p for key, attr in self.entries[adapter].trained if (p := held[attr]) is not None}

    def terms(self, items: tuple[AdapterExpr, ...]) -> list[Term | Branches]:
        """The terms of the recursion for the adapters of `items` that are here, in order."""
        found: list[Term | Branches] = []
        for item in items:
            if isinstance(item, CombinedExpr):
                pairs = [(w, self.terms(b)) for w, b in zip(item.weights, item.branches, strict=True)]
                if branches := [(w, b) for w, b in pairs if b]:
                    found.append(Branches(branches))
                continue
            entry = self.entries.get(item)
            if entry is not None:
                found.append(term_of(entry.method, self.tensors(item), self))
        return found

    def adapter(self, name: str) -> tuple[Method, dict[str, Tensor]] | None:
        """The method and the tensors of another adapter here, or None where it has none."""
        entry = self.entries.get(name)
        return None if entry is None else (entry.method, self.tensors(name))

    def split(self, values: Mapping[str, Tensor], entry: AdapterAtSite) -> dict[str, Tensor]:
        """An adapter's whole tensors by attribute, each split as tensor parallelism splits the layer's weight."""
        if self.backend is None or not is_distributed(self.reference):
            return dict(values)
        weight, method = self.current_weight().detach(), entry.method
        assert is_distributed(weight)
        keys = {attr: key for key, attr in (*entry.trained, *entry.frozen)}
        keep = {"in"} if self.lookup else set()  # ids are looked up in every process
        axes = {attr: method.declared(key).axes_at(method, self) for attr, key in keys.items()}
        return {a: tensor_parallel.distribute_like(t, weight, axes[a], keep) for a, t in values.items()}
