"""Did-you-mean hints and short forms for messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def show(spec: object) -> str:
    if isinstance(spec, str) or not isinstance(spec, Collection):
        return repr(spec)
    names = sorted(spec) if isinstance(spec, (set, frozenset)) else list(spec)
    return repr(names) if len(names) <= 12 else f"[{', '.join(map(repr, names[:12]))}, … {len(names)} names]"


def plain(value: object) -> str | None:
    """A string, also of an enum of strings, whose `str` is not its value."""
    return None if value is None else str(getattr(value, "value", value))


def suggest(value: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest candidate, or an empty string."""
    near = difflib.get_close_matches(value, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
