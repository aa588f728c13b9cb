"""Lists of methods that are written by hand, in places that a new method would have to be added to."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from source_tree import Function, Module, Source, last_name

# Constants with what another library has in a fixed version; a method that is added here changes nothing in them.
SNAPSHOTS = {"PEFT_METHODS": "peft", "NOT_INJECTED": "peft", "TAILS": "AdapterHub"}
TENSOR_TABLES = frozenset({"names", "aliases", "shared_names", "trained_shared", "file_names", "tensors"})


def collect_method_words(source: Source) -> dict[str, str]:
    """Words that name one registered method -> that method.

    These are its name in the registry, also in lower case and as the name of its file; its config class, and `LoraModel`
    and `LoraLayer` beside `LoraConfig`; its tensors, and prefixes of them that end in "_". Words that two methods share
    name neither, and methods that are marked internal have no words: no user meets their names.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for module in source:
        if module.package != "methods":
            continue
        classes = [(c, name) for c in module.tree.body if isinstance(c, ast.ClassDef) and (name := _registered_name(c))]
        for cls, name in classes:
            stem = cls.name.removesuffix("Config")
            words = {name, name.lower(), cls.name, f"{stem}Model", f"{stem}Layer"}
            words |= {module.path.stem} if len(classes) == 1 else set()
            for tensor in _list_tensor_names(cls):
                cuts = [n + 1 for n, letter in enumerate(tensor) if letter == "_"]
                words |= {tensor, *(tensor[:cut] for cut in cuts)}
            for word in words:
                owners[word].add(name)
    return {word: names.pop() for word, names in owners.items() if len(names) == 1}


def _registered_name(cls: ast.ClassDef) -> str | None:
    """The name in `@method("NAME")`, or None for other classes and for methods marked internal."""
    for call in cls.decorator_list:
        if isinstance(call, ast.Call) and last_name(call.func) == "method" and call.args:
            internal = any(k.arg == "internal" for k in call.keywords)
            name = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
            return name if isinstance(name, str) and not internal else None
    return None


def _list_tensor_names(cls: ast.ClassDef) -> Iterator[str]:
    """Names of a method's tensors in files, with the fixed beginning of those that an f-string makes."""
    for statement in cls.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            strings = [n.value for n in ast.walk(statement.value) if isinstance(n, ast.Constant)]
            for name in strings if {last_name(t) for t in targets} & TENSOR_TABLES else ():
                # "weight", "out" and "base_layer" name no method, and neither does the "_" of f"{side}_{part}".
                parts = name.split(".") if isinstance(name, str) else ()
                yield from (p for p in parts if re.match(r"[a-zA-Z]\w+_", p) and p != "base_layer")


def find_hand_lists(source: Source) -> dict[str, list[str]]:
    """Places outside methods/ that list methods by hand -> what shows it. A new method would have to be added there.

    A list is one of the following that names at least two methods: a literal (tuple, list, set, dict, or a string such as
    a regular expression), conditions joined by `or` and `and`, a ladder of if/elif or match, the plain statements of a file,
    of a class (with the names of its functions) or of `if TYPE_CHECKING`. Code that treats a single method specially is not
    a list, and neither is a comment, a docstring or a message in prose. Folders or files named after methods, such as
    peft/tuners/lora and peft/tuners/ia3, are one place together. The constants in SNAPSHOTS are not counted.
    """
    words = collect_method_words(source)
    found: dict[str, list[str]] = defaultdict(list)
    families: dict[str, set[str]] = defaultdict(set)
    for module in source:
        if module.package == "methods":
            continue
        parts = module.relative.with_suffix("").parts
        for n, part in enumerate(parts):
            if part in words:
                families["/".join([*parts[:n], "NAME"])].add(words[part])
        snapshots = [n for n in module.tree.body if isinstance(n, ast.Assign) and last_name(n.targets[0]) in SNAPSHOTS]
        passed = module.docstrings | {id(n) for top in snapshots for n in ast.walk(top)}
        # Literals before statements: what is inside a list that is reported does not make its surroundings one.
        for nodes in sorted(_list_candidates(module), key=lambda nodes: len(nodes) > 1):
            below = [n for top in nodes for n in ast.walk(top) if id(n) not in passed]
            first: dict[str, tuple[str, ast.AST]] = {}  # method -> the first word for it, and where
            for node in below:
                for word in _words_in(node, words):
                    if word in words:
                        first.setdefault(words[word], (word, node))
            if len(first) > 1:
                passed.update(map(id, below))
                shown = ", ".join(word for word, _ in first.values())
                line = min(getattr(node, "lineno", module.lines) for _, node in first.values())
                found[module.relative.as_posix()].append(module.at(line, f"lists {shown}"))
    for place, named in families.items():
        if len(named) > 1:
            found[place].append(f"{place}: one for each of {', '.join(sorted(named))}")
    return dict(sorted(found.items()))


def _list_candidates(module: Module) -> Iterator[Sequence[ast.AST]]:
    """Groups of nodes that are a list if they name several methods."""
    plain = (ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom, ast.Expr)
    for node in module.nodes:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.BoolOp, ast.Constant)):
            yield [node]
        elif isinstance(node, (ast.Module, ast.ClassDef)):
            defined = [n for n in node.body if isinstance(n, (Function, ast.ClassDef))]
            names = [ast.copy_location(ast.Name(n.name), n) for n in defined]
            yield [*(n for n in node.body if isinstance(n, plain)), *names]
        elif isinstance(node, ast.Match):
            yield [case.pattern for case in node.cases]
        elif isinstance(node, ast.If):
            if last_name(node.test) == "TYPE_CHECKING":
                yield node.body
            tests = [node.test]
            while len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
                node = node.orelse[0]
                tests.append(node.test)
            yield tests


def _words_in(node: ast.AST, words: Mapping[str, str]) -> Iterable[str]:
    """Words of a string, unless it is prose, and names."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = node.value.split()
        return re.findall(r"\w+", node.value) if len(parts) == 1 or all(p in words for p in parts) else ()
    if isinstance(node, ast.alias):
        return (node.name, *(node.asname or "").split())
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")
    return (last_name(node),)
