"""Who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from floors import find_circles, find_silent_packages, find_upward_arrows
from source_tree import Source

SRC = Path(__file__).parents[1] / "src" / "veneer"
FILES = sorted(p.relative_to(SRC).as_posix() for p in SRC.rglob("*.py"))
HEAVY = ("transformers", "accelerate", "datasets", "bitsandbytes", "peft", "rich", "yaml", "numpy.testing")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, those of the package as `veneer.x.y`."""
    package = ("veneer", *path.relative_to(SRC).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{a.name}" for a in node.names if node.level and not node.module}
    return found


def inside(modules: set[str], *allowed: str) -> set[str]:
    """The package's modules among `modules` that are not in `allowed`."""
    return {m for m in modules if m.startswith("veneer.") and not m.startswith(allowed)}


GENERAL = (
    "base",
    "hooks",
    "config",
    "fields",
    "tensors",
    "copies",
    "registry",
    "peft_types",
    "checks",
    "config_file",
)  # files of methods/ that are not a method
METHODS = {f"veneer.methods.{Path(f).stem}" for f in FILES if f.startswith("methods/")} - {
    f"veneer.methods.{name}" for name in (*GENERAL, "__init__")
}
CORE = ("algebra", "distributed", "backends", "io", "targets", "layers", "injection", "kernels", "prompts", "lifecycle",
        "training", "files", "serving", "model", "interop")  # fmt: skip


@pytest.mark.parametrize("name", [f for f in FILES if f.startswith("methods/")])
def test_methods_import_lower_floors_only(name: str) -> None:
    lower = ("algebra", "distributed", "backends", "io", "targets", "layers", "methods")
    assert not inside(imports(SRC / name), *(f"veneer.{package}" for package in lower))


# Files about LoRA's own layout: its separate and fused factors, its scales.
OF_LORA = ("files/fused_layers.py", "serving/hotswap.py")


@pytest.mark.parametrize("name", [f for f in FILES if f.split("/")[0] in CORE and f not in OF_LORA])
def test_the_core_names_no_method(name: str) -> None:
    text = (SRC / name).read_text()
    assert not imports(SRC / name) & METHODS
    for word in ("LORA", "IA3", "LOHA", "OFTConfig", "VERA", "LoraConfig("):
        code = "\n".join(line for line in text.splitlines() if "pass a config such as" not in line)
        assert f'"{word}"' not in code and f"'{word}'" not in code and f"is {word}" not in code, word


def test_imports_go_down() -> None:
    """All imports count, those inside functions and under TYPE_CHECKING too; tools/floors.py has the floors."""
    source = Source(SRC.parents[1])
    assert not find_circles(source)
    assert not find_upward_arrows(source)
    assert not find_silent_packages(source), "an __init__ says what its package is for and what it may import"


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_peft(name: str) -> None:
    assert not {m for m in imports(SRC / name) if m.split(".")[0] == "peft"}


def test_import_is_light() -> None:
    code = (
        "import sys, veneer; veneer.get_peft_model; veneer.LoraConfig; veneer.PeftModel; veneer.PeftType.LORA;"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import veneer

    names = {}
    exec("from veneer import *", names)
    assert {"LoraConfig", "PeftModel", "get_peft_model", "PeftConfig", "TaskType"} <= names.keys()
    assert set(veneer.__all__) <= names.keys() and set(veneer.__all__) <= set(dir(veneer))
    with pytest.raises(AttributeError, match="no attribute 'LoraModle'"):
        veneer.LoraModle  # noqa: B018
