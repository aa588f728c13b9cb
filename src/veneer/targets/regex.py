"""Regular expressions of configs, which a stranger may have written: compiled once, matched within a time limit.

Python's `re` cannot be interrupted, and an expression such as `(a+)+b` backtracks exponentially. The package regex takes a
timeout. An expression is valid if `re` compiles it, and means what it means there: regex in its version 0 differs for
braces (`a{e<=1}` allows errors) and for `[:` (POSIX classes), which are escaped first. Two differences stay, of no use in
names of modules: `\\B` matches in an empty string, as in `re` from Python 3.14 on, and `[^\\W\\w]` matches letters.
"""

from __future__ import annotations

import functools
import re
import time
from typing import Any

LONGEST = 1 << 16  # characters; peft itself writes expressions of some thousands
SECONDS = 2.0  # of one expression, on all names of a model
WINDOW = 60.0  # seconds after which an expression has its time again: the next model's
FREE = 50e-6  # seconds of a match that do not count: large models have a hundred thousand names
# Escapes stay as they are; a brace that opens no repetition, and a colon after a bracket, are literals in `re`.
_LITERALS = re.compile(r"(?s)\\N\{[^}]*\}|\\.|(?P<literal>\{(?!\d*,?\d*\})|(?<=\[):)")


class BoundedPattern:
    """An expression with a limit on the time that all its matches on one model take together."""

    def __init__(self, pattern: str, field: str, shown: str) -> None:
        # Here and not above: only a config with an expression pays for the import.
        import regex

        self.pattern, self._field, self._shown = pattern, field, shown
        try:
            self._inner = regex.compile(_LITERALS.sub(_escape_literal, pattern), regex.VERSION0)
        except regex.error as error:
            raise ValueError(f"{field}={shown} is no valid regular expression: {error}") from error
        self._spent, self._since = 0.0, time.monotonic()

    def match(self, text: str) -> Any:
        """As `re.Pattern.match`.

        Raises:
            ValueError: the time is spent.
        """
        return self._run(self._inner.match, text)

    def fullmatch(self, text: str) -> Any:
        """As `re.Pattern.fullmatch`.

        Raises:
            ValueError: the time is spent.
        """
        return self._run(self._inner.fullmatch, text)

    def _run(self, match: Any, text: str) -> Any:
        started = time.monotonic()
        if started - self._since > WINDOW:
            self._spent, self._since = 0.0, started
        try:
            return match(text, timeout=max(SECONDS - self._spent, 0.01))
        except TimeoutError:
            raise ValueError(
                f"{self._field}={self._shown}: matching takes more than {SECONDS:g} s, as repetitions within repetitions "
                "do; simplify it, or name the modules in a list"
            ) from None
        finally:
            self._spent += max(time.monotonic() - started - FREE, 0.0)


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str, field: str, value: str | None = None) -> BoundedPattern:
    """A config's regular expression.

    Args:
        pattern: the expression.
        field: the field it comes from, for messages.
        value: the field's value, if that is not the whole expression.

    Raises:
        ValueError: it is invalid, or very long.
    """
    shown = repr(value or pattern)[:200]
    if len(pattern) > LONGEST:
        raise ValueError(f"{field}={shown}...: {len(pattern):,} characters; {LONGEST:,} are allowed")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field}={shown} is no valid regular expression: {error}") from error
    return BoundedPattern(pattern, field, shown)


def _escape_literal(found: re.Match[str]) -> str:
    return found[0] if found["literal"] is None else f"\\{found[0]}"
