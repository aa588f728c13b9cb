"""The places that evaluate the recursion of terms and branches."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from source_tree import Function, Source, group_circular, last_name

TERM_FIELDS = frozenset({"delta", "left", "right", "shift", "post"})


def find_evaluators(source: Source) -> list[str]:
    """Functions that evaluate the recursion of terms and branches.

    A function counts if it reads `.branches` and at least one of a term's five fields: it goes through a chain with its
    branches and acts on what the terms hold. One that reads `.branches` alone only collects or walks (`walk`, `flat`), and
    one that reads fields alone looks at a single term, as a kernel does that may decline. Inner functions count with the
    function around them, and functions of one file that call one another in a circle count as one: the split of an
    evaluator in two is still an evaluator.
    """
    found = []
    for module in source:
        functions = {(owner, f.name): f for owner, f in _list_functions(module.tree)}
        calls = {key: _called_by(key[0], f, functions) for key, f in functions.items()}
        for group in group_circular(calls):
            reads = {name for key in group for name in _read_attributes(functions[key])}
            if "branches" in reads and reads & TERM_FIELDS:
                names = sorted(f"{owner}.{name}" if owner else name for owner, name in group)
                found.append(module.at(min(functions[k].lineno for k in group), " with ".join(names)))
    return found


def _list_functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Functions of a file and methods of its classes, with the class's name or ""; inner ones belong to the outer."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield owner, node
        elif isinstance(node, ast.stmt):
            yield from _list_functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def _called_by(owner: str, function: Function, known: Mapping[tuple[str, str], Function]) -> set[tuple[str, str]]:
    """Functions of the same file that a function calls: by name, or as a method of its own class."""
    calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
    keys = {("", f.id) for f in calls if isinstance(f, ast.Name)}
    keys |= {(owner, f.attr) for f in calls if isinstance(f, ast.Attribute) and last_name(f.value) in ("self", "cls")}
    return keys & known.keys()


def _read_attributes(function: Function) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.MatchClass):
            yield from node.kwd_attrs
