"""peft.tuners: the configs, models and layers of the registered methods, each in the folder that peft has it in.

`peft.tuners.lora` and its modules `config`, `layer` and `model` are not files: they are made from the registry.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from ...methods.base import Method
from ...methods.registry import METHODS
from . import tuners_utils
from .tuners_utils import layer_of, stem_of

PARTS = ("config", "layer", "model")
LAYERS = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")


def names_of(cls: type[Method], part: str | None) -> dict[str, Any]:
    """What the folder of a method has in peft, or one of its modules."""
    stem, layer = stem_of(cls), part in (None, "layer")
    found: dict[str, Any] = {}
    if part in (None, "config"):
        found[cls.__name__] = cls
    if part in (None, "model") and cls.peft_name in tuners_utils.TUNERS:
        found[f"{stem}Model"] = tuners_utils.TUNERS[cls.peft_name]
    if layer and cls.acts_on == "layers":
        found[f"{stem}Layer"] = layer_of(f"{stem}Layer", cls.peft_name)
        found |= {name: layer_of(name, cls.peft_name, getattr(nn, name)) for name in LAYERS}
    return found


class TunerFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of the methods' folders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parts = fullname.removeprefix(f"{__name__}.").split(".")
        known = fullname.startswith(f"{__name__}.") and parts[0].upper() in METHODS
        if not known or parts[1:] not in ([], *([p] for p in PARTS)):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=__file__, is_package=len(parts) == 1)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        folder, _, part = module.__name__.removeprefix(f"{__name__}.").partition(".")
        module.__doc__ = f"peft.tuners.{folder}."
        vars(module).update(names_of(METHODS[folder.upper()], part or None))


if not any(isinstance(finder, TunerFinder) for finder in sys.meta_path):
    sys.meta_path.append(TunerFinder())


def __getattr__(name: str) -> Any:
    for cls in METHODS.values():
        if name in (cls.__name__, f"{stem_of(cls)}Model"):
            found = {**names_of(cls, "config"), **names_of(cls, "model")}.get(name)
            if found is not None:
                return found
    raise AttributeError(f"module 'peft.tuners' has no attribute {name!r}")
