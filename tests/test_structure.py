"""The measures of tools/structure.py, on small packages made up for them."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from textwrap import dedent

import pytest

from evaluators import find_evaluators
from floors import FLOORS, LEVEL, find_circles, find_misplaced_packages, find_silent_packages, find_upward_arrows
from floors_svg import WRONG, draw_floors, thin_arrows
from hand_lists import collect_method_words, find_hand_lists
from source_tree import Source, group_circular
from structure import draw_source, main, measure

ROOT = Path(__file__).parents[1]

METHODS = {
    "methods/lora.py": """
        @method("LORA", patterns={})
        class LoraConfig(Method):
            names = {"A": "lora_A.weight", "bias": "base_layer.bias"}
    """,
    "methods/ia3.py": """
        @method("IA3")
        class IA3Config(Method):
            tensors = {"l": Tensor("ia3_l", axes=("out_features", ""))}
    """,
    "methods/loha.py": """
        @method("LOHA")
        class LoHaConfig(Method):
            names = {key: f"hada_{key}" for key in ("w1", "w2")}
    """,
    "methods/full_copy.py": """
        @method("MODULES_TO_SAVE", internal=True)
        class FullCopy(Method):
            names = {"copy": ""}
    """,
}


@pytest.fixture
def package(tmp_path: Path):
    """A function that writes files of src/veneer, each folder with an `__init__`, and reads them."""

    def write(files: dict[str, str]) -> Source:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "src" / "veneer" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text))
            for folder in path.relative_to(tmp_path / "src" / "veneer").parents:
                (tmp_path / "src" / "veneer" / folder / "__init__.py").touch()
        return Source(tmp_path)

    return write


def pairs(source: Source) -> set[tuple[str, str]]:
    return {(a.source.removeprefix("veneer."), a.target.removeprefix("veneer.")) for a in source.arrows}


# Circles


def test_a_circle_that_is_hidden_in_a_function_and_under_type_checking(package) -> None:
    source = package(
        {
            "a.py": "from .low import b",
            "low/b.py": "def f():\n    from ..c import x",
            "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import veneer.a",
            "d.py": "from . import a",
        }
    )
    assert find_circles(source) == [["veneer.a", "veneer.c", "veneer.low.b"]]
    assert {(a.line, a.kind) for a in source.arrows if a.source != "veneer.d"} == {
        (1, "module"),
        (2, "function"),
        (3, "TYPE_CHECKING"),
    }
    figure = measure(source)["circles"]
    assert (figure.value, figure.note, figure.holds) == (3, "largest 3", False)
    assert "  c.py:3 imports a.py (TYPE_CHECKING)" in figure.places


def test_a_name_from_a_package_and_a_module_of_it_are_told_apart(package) -> None:
    source = package(
        {
            "low/__init__.py": "X = 1",
            "low/a.py": "",
            "low/deep/b.py": "from ... import low\nfrom .. import X, a\nfrom ..a import y",
        }
    )
    assert pairs(source) == {("low.deep.b", "low"), ("low.deep.b", "low.a")}


def test_modules_that_are_imported_by_name_count(package) -> None:
    source = package(
        {
            "a.py": "import importlib\nimportlib.import_module('.b', __package__)",
            "b.py": "from importlib import import_module\nHOMES = {'veneer.a': 'x'}\nimport_module(HOMES[0])",
            "c.py": "NAME = 'veneer.a'  # only a string",
        }
    )
    assert pairs(source) == {("a", "b"), ("b", "a")}
    assert find_circles(source) == [["veneer.a", "veneer.b"]]


def test_a_folder_that_is_searched_and_the_package_around_are_no_circle(package) -> None:
    source = package(
        {
            "methods/__init__.py": "import importlib\nfor f in find():\n    importlib.import_module(f'{__name__}.{f}')",
            "methods/registry.py": "import importlib\ndef fill():\n    importlib.import_module('veneer.methods')",
            "methods/lora.py": "from .registry import method",
        }
    )
    assert pairs(source) == {("methods.lora", "methods.registry")}


def test_a_file_that_imports_itself_is_no_circle(package) -> None:
    assert not find_circles(package({"a.py": "def f():\n    from . import a"}))


def test_circles_are_those_of_a_plain_search() -> None:
    """Tarjan's components against reachability, on every graph of four nodes with a fixed spread of arrows."""
    nodes = range(4)
    arrows = [(s, t) for s in nodes for t in nodes if s != t]
    for code in range(0, 1 << len(arrows), 7):
        graph = {n: [t for k, (s, t) in enumerate(arrows) if s == n and code >> k & 1] for n in nodes}
        reach = {n: {n} for n in nodes}
        for _ in nodes:
            reach = {n: {n}.union(*(reach[t] for t in graph[n])) for n in nodes}
        expected = {frozenset(m for m in nodes if m in reach[n] and n in reach[m]) for n in nodes}
        found = [frozenset(g) for g in group_circular(graph)]
        assert set(found) == expected and len(found) == len(expected), graph


# Floors


def test_an_upward_arrow(package) -> None:
    source = package(
        {
            "layers/a.py": "def f():\n    from ..methods import b",
            "methods/b.py": "from ..algebra import c",
            "algebra/c.py": "",
        }
    )
    assert [(a.source, a.target) for a in find_upward_arrows(source)] == [("veneer.layers.a", "veneer.methods.b")]
    assert "layers/a.py:2 imports methods/b.py (function)" in measure(source)["upward"].places


def test_one_floor_may_be_crossed_in_one_direction(package) -> None:
    files = {"io/a.py": "from ..backends import b", "backends/b.py": "", "backends/c.py": "", "io/d.py": ""}
    assert not find_upward_arrows(package(files))
    # Not a circle of files, but of packages.
    assert len(find_upward_arrows(package({**files, "backends/c.py": "from ..io import d"}))) == 2


def test_the_face_may_import_everything_and_new_packages_need_a_floor(package) -> None:
    source = package({"__init__.py": "from .cli import x", "cli/x.py": "", "attic/y.py": "from ..cli import x"})
    assert not find_upward_arrows(source)
    assert find_misplaced_packages(source) == ["attic"]
    assert measure(source)["upward"].value == 1


def test_every_package_is_on_one_floor() -> None:
    names = [p for floor in FLOORS for p in floor]
    assert len(names) == len(set(names)) and LEVEL["algebra"] < LEVEL["methods"] < LEVEL["cli"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Layers. May import targets and everything below.", True),
        ("Layers; imports torch only, and nothing of the package.", True),
        ("Layers, one kind a file.", False),
        ("What others import from here.", False),  # names no package
        ("Layers. May import methods.", False),  # which is above
        ("", False),
    ],
)
def test_a_package_says_what_it_may_import(package, text: str, said: bool) -> None:
    source = package({"layers/__init__.py": f'"""{text}"""' if text else ""})
    assert (find_silent_packages(source) == []) is said


# Sizes


def test_sizes(package) -> None:
    methods = "".join(f"    def m{n}(self): ...\n" for n in range(21))
    source = package(
        {
            "flat.py": "",
            "layers/long.py": "x = 1\n" * 501,
            "layers/fits.py": "x = 1\n" * 500,
            "cli/long.py": "x = 1\n" * 600,
            "layers/large.py": "class Large:\n" + "    x = 1\n" * 300 + f"class Wide:\n{methods}",
        }
    )
    figures = measure(source)
    assert figures["flat"].value == 2 and figures["flat"].holds  # flat.py and __init__.py
    assert figures["core-files"].places == ["layers/long.py:501 lines"]
    assert figures["other-files"].places == ["cli/long.py:600 lines"]
    assert (figures["class-lines"].value, figures["class-lines"].note) == (301, "Large")
    assert (figures["class-methods"].value, figures["class-methods"].note) == (21, "Wide")
    assert figures["class-lines"].places == ["layers/large.py:1 Large 301"]
    assert not any(figures[key].holds for key in ("core-files", "class-lines", "class-methods"))
    assert figures["lines"].value == 501 + 500 + 600 + 301 + 22


# The recursion

EVALUATE = """
def evaluate(terms, x):
    for term in terms:
        if isinstance(term, Branches):
            x = x + sum(w * evaluate(b, x) for w, b in term.branches)
        elif term.delta is not None:
            x = x + term.delta.apply(x)
    return x
"""
WALK = """
def walk(terms):
    for term in terms:
        if isinstance(term, Term):
            yield term
        else:
            for _, branch in term.branches:
                yield from walk(branch)
"""
FIELDS = "def plan(terms):\n    return all(t.left is None and t.shift is None for t in terms)\n"
SPLIT = """
class Kind:
    def chain(self, terms, x):
        for term in terms:
            x = self.fork(term, x) if forked(term) else term.delta(x)
        return x

    def fork(self, term, x):
        def one(branch):
            return self.chain(branch, x)

        return sum(map(one, term.branches))
"""
MATCH = """
def evaluate(term, x):
    match term:
        case Branches(branches=found):
            return sum(evaluate(b, x) for b in found)
        case Term(delta=delta):
            return delta(x)
"""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (EVALUATE, ["evaluate"]),
        (WALK, []),
        (FIELDS, []),
        (SPLIT, ["Kind.chain with Kind.fork"]),
        (MATCH, ["evaluate"]),
    ],
    ids=["evaluates", "walks", "reads one term", "split in two", "match"],
)
def test_an_evaluator(package, text: str, names: list[str]) -> None:
    source = package({"layers/kind.py": text})
    assert [place.split(" ", 1)[1] for place in find_evaluators(source)] == names


def test_a_second_evaluator_is_one_too_many(package) -> None:
    assert measure(package({"algebra/recursion.py": EVALUATE}))["evaluators"].holds
    figure = measure(package({"algebra/recursion.py": EVALUATE, "kernels/own.py": EVALUATE}))["evaluators"]
    assert figure.value == 2 and not figure.holds and "kernels/own.py:2 evaluate" in figure.places


# Lists by hand


def test_words_of_methods(package) -> None:
    words = collect_method_words(package(METHODS))
    assert {w for w, m in words.items() if m == "LORA"} == {
        "LORA", "lora", "LoraConfig", "LoraModel", "LoraLayer", "lora_A", "lora_",
    }  # fmt: skip
    assert words["hada_"] == "LOHA" and words["ia3_l"] == "IA3"
    assert not {"weight", "bias", "base_layer", "full_copy", "MODULES_TO_SAVE"} & words.keys()


@pytest.mark.parametrize(
    "text",
    [
        "PREFIXES = {'IA3': 'ia3_', 'LORA': 'lora_'}",
        "def f(key):\n    return key.startswith(('lora_', 'hada_'))",
        "KEY = r'\\.(lora_A|ia3_l)$'",
        "NAMES = 'LORA IA3'.split()",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .lora import LoraConfig\n    from .ia3 import IA3Config",
        "LoraModel = tuner('LORA')\nIA3Model = tuner('IA3')",
        "class View:\n    def lora_A(self): ...\n    def ia3_l(self): ...",
        "def f(m):\n    if m == 'LORA':\n        return 1\n    elif m == 'IA3':\n        return 2",
        "def f(m):\n    match m:\n        case 'LORA':\n            return 1\n        case 'IA3':\n            return 2",
        "def f(m):\n    return m == 'LORA' or m == 'IA3'",
    ],
    ids=["dict", "tuple", "pattern", "words", "types", "names", "class", "ladder", "match", "or"],
)
def test_a_list_by_hand(package, text: str) -> None:
    source = package({**METHODS, "peft/tables.py": text})
    assert list(find_hand_lists(source)) == ["peft/tables.py"]
    figure = measure(source)["touch"]
    assert (figure.value, figure.note, figure.holds) == (3, "2 + 1 by hand", False)


@pytest.mark.parametrize(
    "text",
    [
        "NAMES = {name: cls.prefix for name, cls in registry().items()}",
        "def f(config):\n    if config.peft_name != 'LORA':\n        raise ValueError('LORA only; IA3 and LOHA cannot be fused')",
        '"""LoraConfig and IA3Config."""\n# "LORA", "IA3"\n',
        "def f():\n    return 'LORA'\n\n\ndef g():\n    return 'IA3'",
        "PARTS = ('weight', 'bias', 'base_layer', 'lora_alpha')",
        "PEFT_METHODS = frozenset(['IA3', 'LORA', 'ROAD'])",
    ],
    ids=["computed", "one method", "prose", "apart", "shared words", "snapshot"],
)
def test_no_list_by_hand(package, text: str) -> None:
    assert not find_hand_lists(package({**METHODS, "peft/tables.py": text}))


def test_folders_named_after_methods_are_one_place(package) -> None:
    source = package({**METHODS, "peft/tuners/lora/layer.py": "", "peft/tuners/ia3/layer.py": "", "checks/lora.py": ""})
    assert list(find_hand_lists(source)) == ["peft/tuners/NAME"]


def test_lines_to_read(package, tmp_path: Path) -> None:
    source = package({**METHODS, "methods/hooks.py": "x = 1\n" * 100, "algebra/operators.py": "x = 1\n" * 50})
    (tmp_path / "CONTRIBUTING.md").write_text(
        "# Contributing\n\n## Add a method\n\none\n\ntwo\n\n## Add a layer\n\nthree\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "table.py").write_text(
        'def row(config):\n    return config\n\n\nMETHODS = {\n    "lora": row(1),\n    "loha": row(\n        2\n    ),\n}\n'
    )
    figure = measure(source)["read"]
    loha = len(dedent(METHODS["methods/loha.py"]).splitlines())
    assert figure.value == 100 + 50 + loha + 5 + (2 + 3) and figure.holds
    assert figure.places[0] == "  100 methods/hooks.py"


# Style


def test_style(package) -> None:
    source = package(
        {
            "layers/a.py": """\
                # one why
                def f(self, a: Any, b: list[Any], *args: Any, **kwargs: Any) -> Any: ...
                def freeze_base(x: int, y: typing.Any): ...
                def _g(): return getattr(f, "x")  # type: ignore[attr-defined]
                def __getattr__(name): ...
                class C:
                    def one(self): return hasattr(self, "x"), self.getattr(1)  # "# two"
            """,
            "cli/b.py": "def run_it(a: Any): ...\n",
        }
    )
    figures = measure(source)
    assert source.lines == 8
    assert figures["any"].value == 100 * 2 / 5  # a, b, x, y and the name of __getattr__; cli is not core
    assert figures["ignores"].value == 1000 / 8
    assert figures["getattr"].value == 1000 * 2 / 8
    assert figures["comments"].value == 100 * 3 / 8 and figures["comments"].note == "25.0 without directives"
    assert figures["comments"].holds  # this bar is a floor
    assert figures["names"].value == 50 and figures["names"].places == ["layers/a.py:2 f", "layers/a.py:4 _g"]


# The script


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "structure.py"), *arguments], check=False, capture_output=True, text=True
    )


def test_exit_codes(package, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package({"layers/a.py": "from ..methods import b", "methods/b.py": ""})
    root = ["--root", str(tmp_path)]
    assert main([*root, "--only", "circles,flat"]) == 0
    assert main([*root, "--only", "circles,upward"]) == 1
    out = capsys.readouterr().out
    assert "circles  files in import circles" in out and out.rstrip().endswith("<= 0  over")
    assert main([*root, "--why", "upward"]) == 1
    assert capsys.readouterr().out.startswith("layers/a.py:1 imports methods/b.py\n")
    main([*root, "--json", "--only", "upward"])
    assert json.loads(capsys.readouterr().out)[0] | {"title": ""} == {
        "key": "upward", "title": "", "value": 1, "bar": 0, "at_least": False, "note": "", "holds": False,
        "places": ["layers/a.py:1 imports methods/b.py"],
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main([*root, "--only", "cirles"])
    assert "no measure cirles; there are circles," in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="--root"):
        main(["--root", str(tmp_path / "elsewhere")])


def test_it_runs_as_a_script_on_this_repository() -> None:
    done = run("--json")
    assert done.returncode in (0, 1), done.stderr
    figures = {f["key"]: f for f in json.loads(done.stdout)}
    assert {"circles", "flat", "evaluators", "touch", "read", "any", "comments", "names", "lines"} <= figures.keys()
    assert figures["lines"]["value"] == sum(
        len(p.read_text().splitlines()) for p in (ROOT / "src" / "veneer").rglob("*.py")
    )
    assert all(f["value"] > 0 for key, f in figures.items() if key in ("read", "touch", "class-lines", "evaluators"))


# The picture


def test_arrows_are_thinned() -> None:
    assert thin_arrows({("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_the_picture(package, tmp_path: Path) -> None:
    files = {
        "methods/a.py": "from ..layers import b\nfrom ..algebra import c",
        "layers/b.py": "from ..algebra import c",
        "algebra/c.py": "",
        "io/d.py": "from ..backends import e",
        "backends/e.py": "",
    }
    source = package(files)
    picture = draw_source(source)
    assert picture == draw_source(Source(tmp_path))
    tree = ET.fromstring(picture)
    texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["methods", "2 files, 2 lines"] and {"layers", "algebra", "io", "backends"} <= set(texts)
    # methods -> layers -> algebra, io -> backends; the third arrow of `methods` is implied.
    assert picture.count('marker-end="url(#tip)"') == 3 and f'stroke="{WRONG}"' not in picture
    wrong = draw_source(package({**files, "algebra/c.py": "from ..layers import b"}))
    assert wrong.count(f'stroke="{WRONG}"') == 1
    assert main(["--root", str(tmp_path), "--svg", str(tmp_path / "floors.svg")]) == 0
    assert (tmp_path / "floors.svg").read_text() == wrong


def test_boxes_do_not_overlap() -> None:
    picture = draw_floors(
        [["a", "b", "c"], ["d"], ["e", "f"]], {("a", "f"), ("b", "d"), ("c", "e"), ("d", "e")}, (), {}
    )
    boxes = [r for r in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect") if r.get("rx")]
    rows: dict[str, list[tuple[float, float]]] = {}
    for box in boxes:
        rows.setdefault(box.get("y"), []).append((float(box.get("x")), float(box.get("width"))))
    assert len(boxes) == 6 and len(rows) == 3
    for row in map(sorted, rows.values()):
        assert all(x + width < other for (x, width), (other, _) in zip(row, row[1:], strict=False))
