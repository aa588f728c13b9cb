"""Opaque modules: anything at all, adapted by a full trained copy that runs in its place."""

from __future__ import annotations

from torch import nn

from .geometry import Geometry
from .kind import LayerKind


class Opaque(LayerKind):
    name = "module"
    param = ""
    whole = True

    def matches(self, module: nn.Module) -> bool:
        return False  # named through modules_to_save only

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        return Geometry(0, 0)
