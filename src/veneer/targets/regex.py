"""Regular expressions of configs, which a stranger may have written: compiled once, and bounded in time.

Python's `re` cannot be interrupted, and an expression such as `(a+)+b` takes it longer than a life on a name of forty
letters. Expressions that can blow up are matched by the package regex, which stops at a time limit; all others by `re`.
"""

from __future__ import annotations

import functools
import re
import time
from typing import Any

LONGEST = 1 << 16  # characters; peft itself writes expressions of some thousands
SECONDS = 2.0  # of one expression, on all names of a model


@functools.lru_cache(maxsize=1024)
def compiled(pattern: str, field: str, value: str | None = None) -> re.Pattern[str] | Timed:
    """A config's regular expression.

    Args:
        pattern: the expression.
        field: the field it comes from, for messages.
        value: what stands in the field, where that is not the whole expression.

    Raises:
        ValueError: it is none, or a very long one.
    """
    shown = repr(value or pattern)[:200]
    if len(pattern) > LONGEST:
        raise ValueError(f"{field}={shown}...: {len(pattern):,} characters; {LONGEST:,} are allowed")
    try:
        made = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field}={shown} is no valid regular expression: {error}") from error
    return Timed(pattern, field, shown) if explosive(pattern) else made


class Timed:
    """An expression that could blow up, with a limit on the time that all its matches take together."""

    def __init__(self, pattern: str, field: str, shown: str) -> None:
        try:
            import regex  # type: ignore[import-untyped]
        except ImportError as error:
            raise ValueError(
                f"{field}={shown}: repetitions within repetitions can take forever; simplify it, or install what stops in "
                "time: pip install regex"
            ) from error
        try:
            self.inner = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"{field}={shown} is no valid regular expression: {error}") from error
        self.pattern, self.field, self.shown, self.spent = pattern, field, shown, 0.0

    def timed(self, match: Any, text: str) -> Any:
        started = time.perf_counter()
        try:
            return match(text, timeout=max(SECONDS - self.spent, 0.01))
        except TimeoutError:
            raise ValueError(
                f"{self.field}={self.shown}: matching takes more than {SECONDS:g} s, as repetitions within repetitions "
                "do; simplify it, or name the modules in a list"
            ) from None
        finally:
            self.spent += time.perf_counter() - started

    def match(self, text: str) -> Any:
        return self.timed(self.inner.match, text)

    def fullmatch(self, text: str) -> Any:
        return self.timed(self.inner.fullmatch, text)


def explosive(pattern: str) -> bool:
    """Whether matching may take more than cubic time: a repeated group with a repetition or a choice in it, four
    repetitions, or a reference back.
    """
    open_groups = [False]  # for each open group, whether it holds a repetition or a choice
    repeats, at, closed = 0, 0, False  # closed: whether a group that holds one ended just before
    while at < len(pattern):
        c = pattern[at]
        ended, closed = closed, False
        if c == "\\":
            if pattern[at + 1 : at + 2].isdigit() and pattern[at + 1] != "0":
                return True
            at += 1
        elif c == "[":
            at = pattern.find("]", at + 2 + (pattern[at + 1 : at + 2] == "^"))
            if at < 0:
                return False  # no expression
        elif c == "(":
            if pattern.startswith("(?P=", at) or pattern.startswith("(?(", at):
                return True
            open_groups.append(False)
        elif c == ")" and len(open_groups) > 1:
            closed = open_groups.pop()
            open_groups[-1] |= closed
        elif c == "|":
            open_groups[-1] = True
        elif c in "*+" or (c == "{" and re.match(r"\{\d*,?\d*\}", pattern[at:])):
            bounded = c == "{" and not re.match(r"\{\d*,\}|\{\d*,?\d{2,}\}", pattern[at:])
            if not bounded:
                repeats += 1
                if ended or repeats > 3:
                    return True
                open_groups[-1] = True
        at += 1
    return False
