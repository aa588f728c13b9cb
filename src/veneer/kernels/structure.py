"""Which submodules a module calls on one input, read off the source of its forward. No model code is changed.

Found here are siblings, `self.a(x)` and `self.b(x)` in one block of statements, and gated feed-forward networks,
`self.down(self.act(self.gate(x)) * self.up(x))`. A forward whose source cannot be read has neither.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn


class Gated(NamedTuple):
    """Names of the submodules of a gated feed-forward network."""

    gate: str
    act: str
    up: str
    down: str


def find_siblings(base: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Groups of submodules that a class's forward calls on the same input, each group in one run of statements."""
    return _siblings(base.forward)


def decode_gated(base: type[nn.Module]) -> Gated | None:
    """The parts of a gated feed-forward network, if a class's forward is exactly one."""
    return _gated(base.forward)


# By the function, since the forward of a class may be replaced.


@lru_cache(maxsize=512)
def _siblings(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    body = _source(forward)
    return () if body is None else tuple(_groups(body.body))


@lru_cache(maxsize=512)
def _gated(forward: Callable[..., Any]) -> Gated | None:
    function = _source(forward)
    if function is None or len(function.args.args) != 2:
        return None
    if function.decorator_list or "__wrapped__" in forward.__dict__:  # a decorator may do more
        return None
    value = _result(function)
    down = _call(value)
    product = down and down[1]
    if down is None or not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    for left, right in ((product.left, product.right), (product.right, product.left)):
        act, up = _call(left), _call(right)
        gate = act and _call(act[1])
        if act and up and gate:
            x = function.args.args[1].arg
            if all(isinstance(c[1], ast.Name) and c[1].id == x for c in (gate, up)):
                return Gated(gate[0], act[0], up[0], down[0])
    return None


def _source(forward: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0] if tree.body else None
    return found if isinstance(found, ast.FunctionDef) else None


def _result(function: ast.FunctionDef) -> ast.expr | None:
    """The returned expression of a forward that only assigns names, each used once, with the names filled in."""
    known: dict[str, ast.expr] = {}
    unused: set[str] = set()

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id in unused:
                unused.remove(node.id)
            elif node.id in known:  # once more
                unused.add("")
            return known.get(node.id, node)

    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if not isinstance(target, ast.Name):
                return None
            value = Fill().visit(statement.value)
            if target.id in unused:
                return None
            known[target.id] = value
            unused.add(target.id)
        elif isinstance(statement, ast.Return) and statement.value is not None:
            filled: ast.expr = Fill().visit(statement.value)
            return None if unused else filled
        else:
            return None
    return None


def _call(node: ast.expr | None) -> tuple[str, ast.expr] | None:
    """(name, argument) of `self.name(argument)`."""
    if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
        return None
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
        return function.attr, node.args[0]
    return None


def _groups(body: list[ast.stmt]) -> Iterator[tuple[str, ...]]:
    found: dict[str, list[str]] = {}

    def close(name: str) -> Iterator[tuple[str, ...]]:
        names = found.pop(name, [])
        if len(names) > 1 and len(set(names)) == len(names):
            yield tuple(names)

    for statement in body:
        inner = [getattr(statement, part, []) for part in ("body", "orelse", "finalbody")]
        if any(inner):
            for part in inner:
                yield from _groups(part)
        else:
            for call in _calls(statement):
                made = _call(call)
                if made is not None and isinstance(made[1], ast.Name):
                    found.setdefault(made[1].id, []).append(made[0])
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield from close(node.id)
    for name in list(found):
        yield from close(name)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls in a statement that are made whenever it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.DictComp)):
            continue
        yield from _calls(child)
        if isinstance(child, ast.Call):
            yield child
