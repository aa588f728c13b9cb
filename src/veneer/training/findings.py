"""What the watch reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class WatchError(RuntimeError):
    """Training would be pointless. `findings` say why."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(str(f) for f in findings))
        self.findings = tuple(findings)


class WatchWarning(UserWarning):
    """Something in the first steps of training is not as it should be."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: what it is, in a word: "cut", "no gradient", "zero gradient", "optimizer", "stale", "still", "not finite",
            "dtype", "frozen", "base", "statistics", "idle", "labels" or "loss".
        what: what was seen, and where.
        cause: the likely cause.
        remedy: what to do.
        fatal: whether training is pointless with it.
    """

    kind: str
    what: str
    cause: str
    remedy: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.what}. {self.cause}. Remedy: {self.remedy}"
