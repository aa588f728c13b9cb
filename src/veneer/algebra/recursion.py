"""The recursion: terms of adapters at a site, branches of terms, and the one function that evaluates them.

f_{i+1}(x) = post(x, L f_i(R x) + Delta x + shift)          f + sum_i w_i (f_i - f) for branches
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from torch import Tensor

from .operator import Operator

X = TypeVar("X")  # the input of a layer, as a semantics sees it
Y = TypeVar("Y")  # its output
Post = Callable[[Any, Tensor], Tensor]


class Term:
    """The operators of one adapter at one site in one forward: a term of the recursion."""

    __slots__ = ("delta", "left", "post", "right", "shift")

    def __init__(
        self,
        delta: Operator | None,
        left: Operator | None,
        right: Operator | None,
        shift: Tensor | None,
        post: Post | None,
    ) -> None:
        self.delta, self.left, self.right, self.shift, self.post = delta, left, right, shift, post


class Branches:
    """Branches of the recursion that start from the same output; their weighted changes to it are added."""

    __slots__ = ("branches",)

    def __init__(self, branches: list[tuple[float, list[Term | Branches]]]) -> None:
        self.branches = branches


Terms: TypeAlias = Sequence[Term | Branches]


def walk_terms(terms: Terms) -> Iterator[Term]:
    """The terms in a chain, those of its branches too."""
    for term in terms:
        if isinstance(term, Term):
            yield term
        else:
            for _, branch in term.branches:
                yield from walk_terms(branch)


class Semantics(Generic[X, Y]):
    """What the parts of a term do to an output Y of a layer for an input X: matrices, activations, ids, whole modules.

    A part that a subclass does not define cannot act there; whoever evaluates has refused it before.
    """

    def right(self, op: Operator, inner: Callable[[X], Y], x: X) -> Y:
        """`inner` after R: inner(R x)."""
        raise NotImplementedError

    def delta(self, op: Operator, x: X, y: Y) -> Y:
        """Y + Delta x."""
        raise NotImplementedError

    def left(self, op: Operator, y: Y) -> Y:
        """L y."""
        raise NotImplementedError

    def shift(self, vector: Tensor, y: Y) -> Y:
        """Y + vector, of (out,)."""
        raise NotImplementedError

    def post(self, function: Post, x: X, y: Y) -> Y:
        """function(x, y)."""
        raise NotImplementedError

    def mix(self, y: Y, share: float, branch: Y, start: Y) -> Y:
        """Y + share (branch - start), of a branch that began at `start`."""
        raise NotImplementedError


def evaluate(terms: Terms, semantics: Semantics[X, Y], x: X, f: Callable[[X], Y]) -> Y:
    """The terms around f, at x.

    Args:
        terms: the innermost first.
        semantics: what the parts of a term do.
        x: the input.
        f: the layer without adapters.
    """
    if not terms:
        return f(x)
    *before, term = terms
    if isinstance(term, Branches):
        start = evaluate(before, semantics, x, f)

        def known(z: X) -> Y:
            return start if z is x else evaluate(before, semantics, z, f)  # a branch with R asks at another input

        y = start
        for share, branch in term.branches:
            y = semantics.mix(y, share, evaluate(branch, semantics, x, known), start)
        return y
    if term.right is None:
        y = evaluate(before, semantics, x, f)
    else:
        y = semantics.right(term.right, lambda z: evaluate(before, semantics, z, f), x)
    if term.delta is not None:
        y = semantics.delta(term.delta, x, y)
    if term.left is not None:
        y = semantics.left(term.left, y)
    if term.shift is not None:
        y = semantics.shift(term.shift, y)
    return y if term.post is None else semantics.post(term.post, x, y)
