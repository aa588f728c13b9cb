"""Adding a method is one file in `methods/` and one row in the table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import veneer

TOY = '''
"""A toy: one trained number a layer that scales its output channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..algebra.operators import Diagonal, Operator
from ..layers.site import Site
from .base import Method
from .hooks import Tensors
from .registry import method
from .tensors import Trained


@method("TOY")
@dataclass
class ToyConfig(Method):
    """Toy:  W' = exp(t) W"""

    target_modules: Any = None

    tensors = {"t": Trained("toy_t")}

    def init(self, site: Site) -> dict[str, Tensor]:
        return {"t": site.zeros(1)}

    def left(self, p: Tensors, site: Site) -> Operator:
        return Diagonal(p["t"].exp().expand(site.fan_out))
'''

ROW = '\nMETHODS = {"toy": row("ToyConfig", not_for="parameter")}\n'


def test_one_file_and_one_row(tmp_path: Path) -> None:
    """A copy of the package with one file more passes the whole table on one row more."""
    import shutil

    here = Path(__file__).parent
    shutil.copytree(
        Path(veneer.__file__).parent, tmp_path / "veneer", ignore=shutil.ignore_patterns("cli", "__pycache__")
    )
    (tmp_path / "veneer" / "methods" / "toy.py").write_text(TOY)
    for name in ("test_table.py", "conftest.py"):
        shutil.copy(here / name, tmp_path / name)
    (tmp_path / "table.py").write_text((here / "table.py").read_text() + ROW)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_table.py"],
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
