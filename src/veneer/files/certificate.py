"""The certificate that `verify` writes beside an adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io import atomic_write, locate, safe_read

NAME = locate.CERTIFICATE_NAME
FORMAT = 1
LARGEST = 1 << 20  # bytes of a certificate that is read
WINDOWS, WINDOW = 64, 256  # of a file, for the quick look


class CertificateWarning(UserWarning):
    """An adapter's files are not those that its certificate was written for."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether it holds; None where it does not apply, or could not be looked at.
        difference: largest difference of outputs, over the largest output; None where nothing was compared.
        allowed: up to where it may be.
        note: why it does not apply, or what else there is to say.
    """

    name: str
    passed: bool | None
    difference: float | None = None
    allowed: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Certificate:
    """What `verify` found.

    Attributes:
        date: UTC, to the second.
        base: id of the base model's fingerprint.
        effect: largest change of an output by the adapter, over the largest output; 0 is an adapter that does nothing.
        checks: one after the other.
        versions: of what took part.
        files: name -> size, hash of all and hash of samples, of the files that it is for.
    """

    date: str
    base: str
    effect: float
    checks: tuple[Check, ...]
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(c.passed is not False for c in self.checks)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "passed": self.passed} | dataclasses.asdict(self), indent=2) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `adapter_certificate.json` beside an adapter's files."""
        atomic_write.save_text(Path(folder) / NAME, self.to_json())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Certificate | None:
        """The certificate in a folder; None where there is none, or one of a later format.

        Raises:
            ValueError: what stands in its place is none.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            return None
        try:
            values = safe_read.json_object(path, LARGEST)
            if values["format"] != FORMAT:
                return None
            checks = tuple(Check(**c) for c in values["checks"])
            files = {str(k): dict(v) for k, v in values["files"].items()}
            return cls(
                str(values["date"]), str(values["base"]), float(values["effect"]), checks, values["versions"], files
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no certificate ({error}); delete it, or write it anew with veneer verify"
            ) from error

    def differs(self, folder: Path, *, whole: bool = False) -> list[str]:
        """Which of its files in a folder are others now: by size and samples, or by every byte."""
        which = "sha256" if whole else "sampled"
        found = []
        for name, said in self.files.items():
            path = folder / Path(name).name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != said.get("size") or file_digest(path, whole=whole) != said.get(which):
                found.append(f"{name} is another")
        return found


def file_digest(path: Path, *, whole: bool) -> str:
    """SHA-256 of a file, or of its size, its first 64 KiB and 64 windows that lie evenly in it."""
    if whole:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        found.update(file.read(1 << 16))
        for i in range(WINDOWS):
            file.seek(size * i // WINDOWS)
            found.update(file.read(WINDOW))
    return found.hexdigest()


def recheck_certificate(folder: Path) -> None:
    """Warn where the files of an adapter are not those of its certificate, or it says that they failed."""
    certificate = Certificate.load(folder)
    if certificate is None:
        return
    changed = certificate.differs(folder)
    if changed:
        warnings.warn(
            f"{folder / NAME} was written for other files ({'; '.join(changed)}): the adapter was changed after it was "
            "verified; run veneer verify again, or delete the certificate",
            CertificateWarning,
            stacklevel=4,
        )
    elif not certificate.passed:
        failed = ", ".join(c.name for c in certificate.checks if c.passed is False)
        warnings.warn(f"{folder / NAME} says that the adapter failed: {failed}", CertificateWarning, stacklevel=4)


def library_versions() -> dict[str, str]:
    """Of the libraries that take part."""
    found = {"python": sys.version.split()[0]}
    for name in ("veneer", "torch", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
