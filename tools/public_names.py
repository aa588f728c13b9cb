"""Writes `src/veneer/__init__.pyi`: the public names with their types, from the registry and from `veneer._HOMES`."""

from __future__ import annotations

import sys
from pathlib import Path

import veneer
from veneer.methods.registry import METHODS

STUB = Path(veneer.__file__).with_name("__init__.pyi")
HEAD = '''"""Made by tools/public_names.py, from the registry; `make architecture` writes it anew."""

'''


def make_stub() -> str:
    """Return the text of the stub."""
    homes = {name: home.removeprefix("veneer.") for name, home in vars(veneer)["_NAMES"].items()}
    homes |= {cls.__name__: cls.__module__.removeprefix("veneer.") for cls in METHODS.values()}
    lines = sorted(f"from .{home} import {name} as {name}" for name, home in homes.items())
    return HEAD + "\n".join(lines) + "\n\n__version__: str\n"


if __name__ == "__main__":
    STUB.write_text(make_stub(), "utf-8")
    print(f"wrote {STUB}", file=sys.stderr)
