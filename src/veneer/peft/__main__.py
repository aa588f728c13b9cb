"""python -m veneer.peft SCRIPT [ARGUMENTS], or -m MODULE, or --check: run as if Veneer were peft."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ..interop.console import quiet_libraries
from . import __all__ as names
from . import available_names, enable
from .standin import NAMES_OF

USAGE = "usage: python -m veneer.peft SCRIPT [ARGUMENTS ...] | -m MODULE [ARGUMENTS ...] | --check"


def print_check() -> int:
    """Print which of peft's public names are there; the number of those that are not yet."""
    found = available_names()
    lacking = [n for n in names if n not in found]
    print(
        f"peft {NAMES_OF} has {len(names)} public names; Veneer has {len(found)} of them ({len(found) / len(names):.0%})"
    )
    print("there:   " + " ".join(n for n in names if n in found))
    print("not yet: " + " ".join(lacking))
    return len(lacking)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(USAGE)
    if arguments[0] == "--check":
        raise SystemExit(1 if print_check() else 0)
    quiet_libraries()
    enable()
    if arguments[0] == "-m":
        if len(arguments) < 2:
            raise SystemExit(USAGE)
        sys.argv = arguments[1:]
        if not sys.path or sys.path[0] != "":
            sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = Path(arguments[0])
    if not script.exists():
        raise SystemExit(f"python -m veneer.peft: {script}: no such file; {USAGE}")
    sys.argv = arguments
    sys.path[0] = str(script.parent.resolve())
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
