"""The files of src/veneer as syntax trees, and the imports between them."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

PACKAGE = "veneer"
K = TypeVar("K", bound=Hashable)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Arrow(NamedTuple):
    """One import of one file of the package by another."""

    source: str  # dotted names of modules
    target: str
    line: int
    kind: str  # "module", "function", "TYPE_CHECKING" or "by name"


class Module:
    """One file: its dotted name, its text and its syntax tree."""

    def __init__(self, name: str, path: Path, relative: Path) -> None:
        self.name, self.path, self.relative = name, path, relative
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)
        self.lines = len(self.text.splitlines())

    @property
    def package(self) -> str:
        """The folder directly below the package that the file is in, "" for a flat file."""
        return self.relative.parts[0] if len(self.relative.parts) > 1 else ""

    @property
    def parent(self) -> str:
        """The package that a relative import with one dot starts from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def comments(self) -> list[tokenize.TokenInfo]:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [t for t in tokens if t.type == tokenize.COMMENT]

    @cached_property
    def docstrings(self) -> set[int]:
        """Identities of the string nodes that are docstrings, or strings that stand alone."""
        return {id(n.value) for n in self.nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}

    def at(self, node: ast.AST | int, text: str = "") -> str:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return f"{self.relative.as_posix()}:{line}{text and ' ' + text}"


class Source:
    """The package's files and the imports between them.

    Args:
        root: the repository: holds src/veneer, and for some figures CONTRIBUTING.md and tests/table.py.

    Raises:
        FileNotFoundError: `root` has no src/veneer.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "src" / PACKAGE
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder; pass the root of the repository with --root")
        self.modules: dict[str, Module] = {}
        for path in sorted(self.folder.rglob("*.py")):
            name = ".".join(path.relative_to(root / "src").with_suffix("").parts).removesuffix(".__init__")
            self.modules[name] = Module(name, path, path.relative_to(self.folder))

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules.values())

    @property
    def lines(self) -> int:
        return sum(m.lines for m in self)

    @property
    def packages(self) -> list[str]:
        return sorted({m.package for m in self} - {""})

    @cached_property
    def arrows(self) -> list[Arrow]:
        """All imports of the package's files by one another, the first of each pair of files."""
        found: dict[tuple[str, str], Arrow] = {}
        for module in self:
            for arrow in sorted(_find_imports(module, self.modules), key=lambda a: (a.kind != "module", a.line)):
                if arrow.target != module.name:
                    found.setdefault(arrow[:2], arrow)
        return list(found.values())

    def show_arrow(self, arrow: Arrow) -> str:
        target = self.modules[arrow.target].relative.as_posix()
        how = "" if arrow.kind == "module" else f" ({arrow.kind})"
        return self.modules[arrow.source].at(arrow.line, f"imports {target}{how}")


def _find_imports(module: Module, modules: Mapping[str, Module]) -> Iterator[Arrow]:
    """The imports of a file, wherever they are.

    `from .a import b` imports the module a.b if there is one, else a. Modules that are imported by name count too:
    `importlib.import_module` of a literal, relative or absolute, and in a file that calls `import_module` every literal
    that is the full name of a module (a table of lazy names), except the packages around the file, which Python imports
    before it in any case. A loop over `pkgutil.iter_modules` is not an import of the files that it finds: it names none of
    them, and adding one changes nothing in it.
    """
    by_name = any(isinstance(n, ast.Call) and last_name(n.func) == "import_module" for n in module.nodes)

    def visit(node: ast.AST, kind: str) -> Iterator[Arrow]:
        if isinstance(node, ast.ImportFrom):
            base = _resolve("." * node.level + (node.module or ""), module.parent)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Arrow(module.name, full if full in modules else base, node.lineno, kind)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Arrow(module.name, alias.name, node.lineno, kind)
        elif by_name and isinstance(node, ast.Call) and last_name(node.func) == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.startswith("."):
                yield Arrow(module.name, _resolve(name.value, module.parent), node.lineno, "by name")
        elif by_name and isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield Arrow(module.name, node.value, node.lineno, "by name")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and kind == "module":
            kind = "function"
        if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, "TYPE_CHECKING")
            for child in node.orelse:
                yield from visit(child, kind)
        else:
            for below in ast.iter_child_nodes(node):
                yield from visit(below, kind)

    for arrow in visit(module.tree, "module"):
        around = f"{module.name}.".startswith(f"{arrow.target}.")
        if arrow.target in modules and not (around and arrow.kind == "by name"):
            yield arrow


def _resolve(name: str, parent: str) -> str:
    """The absolute name of a module that `parent` imports by a name with leading dots."""
    bare = name.lstrip(".")
    dots = len(name) - len(bare)
    if not dots:
        return name
    parts = parent.split(".")
    return ".".join([*parts[: len(parts) - dots + 1], *([bare] if bare else [])])


def last_name(node: ast.AST) -> str:
    """`c` of `a.b.c` and of `c`, "" of anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def group_circular(graph: Mapping[K, Iterable[K]]) -> list[list[K]]:
    """The strongly connected components of a graph, in the order in which they are closed (Tarjan, without recursion)."""
    index: dict[K, int] = {}
    low: dict[K, int] = {}
    stack: list[K] = []
    done: set[K] = set()
    groups: list[list[K]] = []
    for start in graph:
        work: list[tuple[K, Iterator[K]]] = [] if start in index else [(start, iter(graph[start]))]
        while work:
            node, rest = work[-1]
            if node not in index:
                index[node] = low[node] = len(index)
                stack.append(node)
            for other in rest:
                if other not in index and other in graph:
                    work.append((other, iter(graph[other])))
                    break
                if other in index and other not in done:
                    low[node] = min(low[node], low[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    group = stack[stack.index(node) :]
                    del stack[-len(group) :]
                    done.update(group)
                    groups.append(group)
    return groups
