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

from torch import Tensor

from ..algebra.operators import Diagonal
from ..algebra.operator import Operator
from ..layers.site import Site
from .base import Method
from .fields import TargetFields
from .hooks import Tensors
from .registry import method
from .tensors import Trained


@method("TOY")
@dataclass
class ToyConfig(TargetFields, Method):
    """Toy. Nobody 2026, arxiv.org/abs/2600.00000, eq. 1:  W' = exp(t) W"""

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


# Run in the copy: what other tables know of a method that is one file.
EVERYWHERE = """
import dataclasses, runpy, sys
import torch
import veneer, veneer.peft
from veneer.files.renamed_modules import module_of
from veneer.methods.registry import METHODS
from veneer.recipes.describe_method import describe_method

veneer.peft.enable()
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.toy import ToyConfig, ToyLayer, ToyModel
from peft.tuners.toy.layer import Linear
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

assert veneer.ToyConfig is ToyConfig is PEFT_TYPE_TO_CONFIG_MAPPING["TOY"]
assert PEFT_TYPE_TO_PREFIX_MAPPING["TOY"] == "toy_" and PEFT_TYPE_TO_TUNER_MAPPING["TOY"] is ToyModel
model = veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), ToyConfig(target_modules=["0"]))
layer = model.base_model.model[0]
assert isinstance(layer, ToyLayer) and isinstance(layer, Linear) and isinstance(model.base_model, ToyModel)
assert list(layer.toy_t) == ["default"] and layer.toy_t["default"].shape == (1,)
assert module_of("base_model.model.some.old.path.toy_t") == "some.old.path"
renamings = build_peft_weight_mapping(None, "default", model.peft_config["default"])
assert any(".toy_t:default" in str(r.target_patterns) for r in renamings)
found = describe_method(ToyConfig)
assert found.title == "Toy" and [f[0] for f in found.fields] == ["modules_to_save", "target_modules", "exclude_modules"]
page = runpy.run_path(sys.argv[1])["page"]("TOY", ToyConfig)
assert "peft_type: TOY" in page and "from veneer import ToyConfig" in page
stub = runpy.run_path(sys.argv[2])["make_stub"]()
assert "from .methods.toy import ToyConfig as ToyConfig" in stub
"""


def test_every_table_has_it(tmp_path: Path) -> None:
    """The stand-in, the layouts, the docs and the public names know a method from its file."""
    import shutil

    root = Path(__file__).parents[1]
    shutil.copytree(Path(veneer.__file__).parent, tmp_path / "veneer", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "veneer" / "methods" / "toy.py").write_text(TOY)
    done = subprocess.run(
        [sys.executable, "-c", EVERYWHERE, root / "docs" / "hooks.py", root / "tools" / "public_names.py"],
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
