"""What a file had, and what the adapter wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


class AdapterLoadError(ValueError):
    """A file does not fit the adapter it is loaded into. `report` lists the keys."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class LoadReport:
    """What a file had and what the adapter wanted.

    Attributes:
        missing: keys the adapter needs that the file lacks.
        unexpected: keys of the file that the adapter has no place for.
        mismatched: key, shape in the file, shape wanted.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def missing_keys(self) -> list[str]:
        return self.missing

    @property
    def unexpected_keys(self) -> list[str]:
        return self.unexpected

    @property
    def clean(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def describe(self, limit: int = 8) -> str:
        lines = []
        for what, keys in (("missing from the file", self.missing), ("not in this adapter", self.unexpected)):
            if keys:
                more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
                lines.append(f"{len(keys)} {what}: {', '.join(keys[:limit])}{more}")
        if self.mismatched:
            shown = [f"{k} is {got}, wanted {want}" for k, got, want in self.mismatched[:limit]]
            more = f" and {len(self.mismatched) - limit} more" if len(self.mismatched) > limit else ""
            lines.append(f"{len(self.mismatched)} of another shape: {'; '.join(shown)}{more}")
        return "\n  ".join(lines)

    def cause(self) -> str:
        if self.mismatched:
            return "the base model has other widths, or r / block size in the config is not the file's"
        if self.missing and self.unexpected:
            return "the file was made for another base architecture, or for another method or layout"
        if self.missing:
            return "target_modules in the config names more layers than were trained, or the file is cut short"
        return "the base model lacks layers that were trained, or target_modules in the config names too few"


class Loader:
    """Hands out the tensors of a file by key, and notes what does not fit."""

    def __init__(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        self.left = dict(tensors)
        self.strict = strict
        self.report = LoadReport()

    def take(self, key: str, shape: torch.Size) -> Tensor | None:
        found = self.left.pop(key, None)
        if found is None:
            self.report.missing.append(key)
            return None
        if found.shape != shape:
            self.report.mismatched.append((key, tuple(found.shape), tuple(shape)))
            return None
        return found
