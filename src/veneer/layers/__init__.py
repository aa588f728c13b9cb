"""The layer kinds and the sites that they measure; may import targets, backends, io, distributed and algebra.

The most specific kind comes first. A module of no kind can still be copied as a whole (`modules_to_save`).
"""

from __future__ import annotations

from torch import nn

from .conv import Conv
from .embedding import Embedding
from .kind import LayerKind
from .linear import Conv1D, Linear, PackedLinear
from .module import Module
from .opaque import Opaque
from .parameter import InProjection, OutProjection, Parameter

KINDS: tuple[LayerKind, ...] = (Linear(), Embedding(), Conv(), Conv1D(), PackedLinear())
PARAMETER, IN_PROJECTION, OUT_PROJECTION = Parameter(), InProjection(), OutProjection()
MODULE, OPAQUE = Module(), Opaque()


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module whose input and output operators can act on, or None."""
    for kind in KINDS:
        if kind.matches(module):
            return kind
    return None


def is_supported(module: nn.Module) -> bool:
    """Whether `target_modules` may name the module."""
    return isinstance(module, nn.MultiheadAttention) or kind_of(module) is not None
