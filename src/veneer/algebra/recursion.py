"""The recursion: terms of adapters at a site, and branches of terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .operators import Operator


class Term:
    """The operators of one adapter at one site in one forward: a term of the recursion."""

    __slots__ = ("delta", "left", "post", "right", "shift")

    def __init__(
        self,
        delta: Operator | None,
        left: Operator | None,
        right: Operator | None,
        shift: Tensor | None,
        post: Callable[[Any, Tensor], Tensor] | None,
    ) -> None:
        self.delta, self.left, self.right, self.shift, self.post = delta, left, right, shift, post


class Branches:
    """Branches of the recursion that start from the same output; their weighted changes to it are added."""

    __slots__ = ("branches",)

    def __init__(self, branches: list[tuple[float, list[Term | Branches]]]) -> None:
        self.branches = branches


def walk_terms(links: Sequence[Term | Branches]) -> Iterator[Term]:
    """The links in a chain, those of its branches too."""
    for link in links:
        if isinstance(link, Term):
            yield link
        else:
            for _, branch in link.branches:
                yield from walk_terms(branch)
