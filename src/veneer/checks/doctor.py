"""Checks whether an adapter's files load in vLLM, transformers, diffusers and peft, and fixes them where that is exact.

Only the files are read, no model. `doctor_files` reads them, `doctor_programs` has the facts about the programs,
`doctor_checks` the checks and `doctor_fixes` the fixes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..io import locate
from .doctor_checks import Case, Incompatibility, list_checks
from .doctor_files import AdapterFiles
from .doctor_fixes import cast_tensors, name_dtype
from .doctor_programs import Accepts

_LEVELS = ("error", "warning", "note")
_ROUNDS = 16  # a fix can reveal another incompatibility


def run_checks(
    files: AdapterFiles, targets: Mapping[str, Accepts], dtype: torch.dtype | None = None
) -> list[Incompatibility]:
    """Find the incompatibilities of an adapter with programs, the worst first.

    Args:
        files: the adapter's files.
        targets: of `TARGETS`, by name.
        dtype: the dtype that the tensors should have; None for any floating one.
    """
    cases = [Case(files, name, accepts) for name, accepts in targets.items()]
    found = [f for case in cases for check in list_checks(files.method) for f in check(case)]
    if dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in files.tensors.values()):
        what = f"tensors are {', '.join(sorted({name_dtype(t.dtype) for t in files.tensors.values()}))}"
        wanted, fix = name_dtype(dtype), partial(cast_tensors, dtype=dtype)
        found += [
            Incompatibility(name, "warning", what, locate.WEIGHTS_NAME, f"{wanted} is wanted", f"--fix: cast to {wanted}",
                            "--dtype", fix)
            for name in targets
        ]  # fmt: skip
    return sorted(found, key=lambda f: _LEVELS.index(f.level))


def apply_fixes(
    files: AdapterFiles, targets: Mapping[str, Accepts], dtype: torch.dtype | None = None
) -> tuple[AdapterFiles, list[Incompatibility]]:
    """Return fixed files and all incompatibilities: the fixed ones, marked, and those that are left.

    Raises:
        ValueError: a fix would change the values, such as a cast beyond a dtype's range.
    """
    made = AdapterFiles(files.where, copy.deepcopy(files.config), dict(files.tensors), files.safe, files.pipeline)
    fixed: list[Incompatibility] = []
    for _ in range(_ROUNDS):
        left = run_checks(made, targets, dtype)
        fix = next((f.fix for f in left if f.fix is not None), None)
        if fix is None:
            return made, [*fixed, *left]
        fix(made)
        now = {(f.target, f.what) for f in run_checks(made, targets, dtype)}
        # One fix often serves several programs.
        fixed += [replace(f, fixed=True) for f in left if f.fix is not None and (f.target, f.what) not in now]
    raise ValueError(f"{files.where}: its cures do not come to an end; this is a fault of Veneer, please report it")


def default_folder(where: str) -> Path:
    """The folder for a fixed copy if none is given."""
    return Path(f"{where.rstrip('/')}-fixed")
