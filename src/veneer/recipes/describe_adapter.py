"""Describes an adapter from its files, without loading a model."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ..files.certificate import Certificate
from ..io import fingerprint, locate, safe_read
from ..methods.base import PeftConfig
from .errors import InputError, user_input


def describe_adapter(adapter: str) -> list[tuple[str, str]]:
    """Return what an adapter is, as names and texts."""
    config = PeftConfig.from_pretrained(adapter)
    path = locate.find_file(adapter, locate.WEIGHTS_NAME)
    if path is None:
        raise InputError(f"{adapter} holds no {locate.WEIGHTS_NAME}")
    tensors = read_header(str(path))
    size = sum(math.prod(shape) for shape, _ in tensors.values())
    dtypes = sorted({dtype for _, dtype in tensors.values()})
    hidden = {"peft_type", "base_model_name_or_path", "task_type", "peft_version", "inference_mode", "auto_mapping"}
    set_fields = {k: v for k, v in config.to_dict().items() if k not in hidden and v not in (None, False, {}, [])}
    return [
        ("method", f"{config.peft_type}  {type(config).__name__}"),
        ("base model", str(config.base_model_name_or_path)),
        ("task", str(config.task_type)),
        ("parameters", f"{size:,} in {len(tensors)} tensors, {', '.join(dtypes)}"),
        ("file", f"{path} ({os.path.getsize(path) / 1e6:.2f} MB)"),
        *_describe_origin(path),
        ("config", ", ".join(f"{k}={v}" for k, v in sorted(set_fields.items()))),
    ]


def _describe_origin(path: Path) -> list[tuple[str, str]]:
    """Return the base model that an adapter's file names, and the result in its certificate."""
    found = []
    if (base := fingerprint.read_fingerprint(path)) is not None:
        sizes = ", ".join(f"{k} {v}" for k, v in base.sizes.items())
        found.append(("trained on", f"{base.architecture}, {sizes}; fingerprint {base.id}"))
    if (certificate := Certificate.load(path.parent)) is not None:
        failed = [c.name for c in certificate.checks if c.passed is False]
        changed = certificate.differs(path.parent, whole=True)
        said = f"failed: {', '.join(failed)}" if failed else "passed"
        said = f"of other files: {'; '.join(changed)}" if changed else said
        found.append(
            ("verified", f"{certificate.date}, {said}; moves outputs by {certificate.effect:.2g} of the largest")
        )
    return found


def read_header(path: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> shape and dtype, from the file's header alone."""
    with user_input():
        return {k: (tuple(e["shape"]), e["dtype"]) for k, e in safe_read.tensor_header(Path(path))[0].items()}
