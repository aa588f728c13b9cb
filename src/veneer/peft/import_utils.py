"""peft.import_utils."""

from __future__ import annotations

import importlib.util


def is_bnb_available() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


is_bnb_4bit_available = is_bnb_available
