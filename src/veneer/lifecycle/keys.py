"""Keys of tensors in adapter files."""

from __future__ import annotations

import torch

from ..injection.entries import AdapterAtSite
from ..methods.base import Method

PREFIX = "base_model.model."
HALF = (torch.float16, torch.bfloat16)


def prefix_of(config: Method, prefix: str) -> str:
    """What the names of modules begin with in a file of this method."""
    return config.file_prefix if prefix == PREFIX else prefix


def file_key(prefix: str, entry: AdapterAtSite, key: str) -> str:
    below = entry.names[key]
    if not entry.key:  # of the adapter as a whole
        return below
    return f"{prefix}{entry.key}.{below}" if below else f"{prefix}{entry.key}"
