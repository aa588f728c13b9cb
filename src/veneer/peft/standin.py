"""Standing in for peft: `import peft` and everything below it resolve to `veneer.peft`, and never to the real one.

A finder that stands first answers for `peft`, its submodules and its installed version. The modules are one object
under both names, so that classes are the same however a script came to them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

NAME, OWN = "peft", "veneer.peft"
NAMES_OF = "0.21.2"  # the release whose public names `--check` counts
VERSION = "0.22.0"  # what is told: transformers 5.24 uses its adapters with no earlier one, and works with what is here
VARIABLE = "VENEER_STANDS_IN_FOR_PEFT"  # "1" in processes that a standing-in one starts
CHILDREN = str(Path(__file__).parent / "children")  # what makes them stand in as well


class Loader(importlib.abc.Loader):
    """Hands out a module of ours under peft's name."""

    def __init__(self, own: str) -> None:
        self.own = own
        self.spec: Any = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.own)
        self.spec = module.__spec__  # importing writes the other name's over it
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` says of an installed peft."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
        return "peft\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class Finder(importlib.metadata.DistributionFinder):
    """First in `sys.meta_path` while Veneer stands in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        own = OWN + fullname[len(NAME) :]
        found = importlib.util.find_spec(own)
        if found is None:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: Veneer stands in for peft and has no such module; "
                "see: python -m veneer.peft --check",
                name=fullname,
            )
        spec = importlib.machinery.ModuleSpec(fullname, Loader(own), origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        if context is None or context.name is None or context.name.lower() == NAME:
            yield Distribution()


def enabled() -> bool:
    """Whether Veneer stands in."""
    return any(isinstance(f, Finder) for f in sys.meta_path)


def enable() -> None:
    """From now on `import peft` is Veneer, in this process and in those that it starts, by whatever means.

    They are reached through PYTHONPATH; one that is started with `python -E` or `-I` is not.

    Raises:
        RuntimeError: the real peft was imported already; a mixture of both would follow.
    """
    if enabled():
        return
    real = sys.modules.get(NAME)
    if real is not None:
        raise RuntimeError(
            f"peft was imported already, from {getattr(real, '__file__', 'somewhere')}; call veneer.peft.enable() before "
            "anything imports it (transformers, trl and diffusers do when they are used), or run the whole script with "
            "python -m veneer.peft SCRIPT"
        )
    from . import layers, trainers

    layers.show_view()
    trainers.show_view()
    sys.meta_path.insert(0, Finder())
    os.environ[VARIABLE] = "1"
    before = os.environ.get("PYTHONPATH")
    if CHILDREN not in (before or "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *([before] if before else [])])


def disable() -> None:
    """Stop standing in. Modules that were imported as peft until now keep what they have."""
    from . import layers, trainers

    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, Finder)]
    for name in [n for n in sys.modules if n == NAME or n.startswith(f"{NAME}.")]:
        del sys.modules[name]
    layers.hide_view()
    trainers.hide_view()
    os.environ.pop(VARIABLE, None)
    left = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != CHILDREN]
    if left:
        os.environ["PYTHONPATH"] = os.pathsep.join(left)
    else:
        os.environ.pop("PYTHONPATH", None)
