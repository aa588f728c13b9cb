"""How a method declares its tensors, one by one: names in the file, the layer's axes, sharing and saving follow from it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..layers.site import Site

Axes = tuple[str, ...]
Sharing = Literal["", "adapter", "first"]
Saving = Literal[True, False, "once"]


@dataclass(frozen=True)
class Declared:
    """One tensor that a method has at its sites; `Trained` or `Constant`.

    What depends on more than the tensor is a function: of the config, or of the config and the site.

    Attributes:
        name: its name in the file, below the module's path; "" for the path itself, None for a tensor that no file holds.
        axes: which dimensions are the layer's own: "in" or "out" for those, "" for others. Processes that split the
            layer's weight along one of them split the tensor with it; () is the same in every process.
        embedding: its name at an embedding, if that is another one.
        parameter: its name at a bare parameter, if that is another one.
        name_at: returns its name from the config and the site, if it depends on more than these.
        reads: further names that files have for it; read, never written.
        shared: "" for one a site; "first" for the first site's, which all sites use; "adapter" for one that
            `init_shared` makes and the file holds below no module.
        shared_name: its name in the file while it is shared by the adapter; None for `name`.
        saved: whether the file holds it; "once" for the first site's key alone.
    """

    name: str | None = None
    axes: Axes | Callable[[Any, Site], Axes] = ()
    embedding: str | None = None
    parameter: str | None = None
    name_at: Callable[[Any, Site], str] | None = None
    reads: tuple[str, ...] = ()
    shared: Sharing | Callable[[Any], Sharing] = ""
    shared_name: str | None = None
    saved: Saving | Callable[[Any], Saving] = True

    trained: ClassVar[bool]

    @property
    def names(self) -> tuple[str, ...]:
        """Every fixed name that a file can have for it."""
        known = (self.name, self.embedding, self.parameter, self.shared_name, *self.reads)
        return tuple(dict.fromkeys(n for n in known if n))

    @property
    def shared_key(self) -> str:
        """Its name in the file while the adapter shares it."""
        return self.shared_name or self.name or ""

    def file_name(self, config: object, site: Site) -> str | None:
        """Its name at `site`, below the module's path."""
        if self.name_at is not None:
            return self.name_at(config, site)
        if self.embedding is not None and site.lookup:
            return self.embedding
        if self.parameter is not None and site.kind.by_parameter:
            return self.parameter
        return self.name

    def shared_by(self, config: object) -> Sharing:
        return self.shared(config) if callable(self.shared) else self.shared

    def saved_by(self, config: object) -> Saving:
        return self.saved(config) if callable(self.saved) else self.saved

    def axes_at(self, config: object, site: Site) -> Axes:
        return self.axes(config, site) if callable(self.axes) else self.axes


class Trained(Declared):
    """A tensor that the optimizer changes."""

    trained = True


class Constant(Declared):
    """A tensor that keeps its value: a buffer of the layer."""

    trained = False


BIAS = Trained("base_layer.bias", axes=("out",))  # the trained copy of a layer's bias that a config's `bias` asks for


def declaration_of(tensors: Mapping[str, Declared], key: str) -> Declared | None:
    """The declaration of `key`; keys such as "mlp_head.*" declare all that they match."""
    found = tensors.get(key)
    if found is None:
        found = next((d for pattern, d in tensors.items() if "*" in pattern and fnmatch.fnmatch(key, pattern)), None)
    return found
