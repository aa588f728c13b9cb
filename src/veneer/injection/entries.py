"""An adapter at a site: its method, its tensors and its term of the recursion."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..algebra.recursion import Term

if TYPE_CHECKING:
    from ..layers.site import Site
    from ..methods.base import Method


class ResidualTap(threading.local):
    """What went into another module in this call, kept for the site that asked for it; one a thread."""

    value: Tensor | None = None

    def __reduce__(self) -> Any:
        return ResidualTap, ()


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
