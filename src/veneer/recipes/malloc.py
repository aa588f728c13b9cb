"""The C library's allocator, where memory is what counts."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LIMITS = {M_MMAP_THRESHOLD: 2**17, M_TRIM_THRESHOLD: 2**17}  # bytes: those with which glibc starts
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def release_memory() -> bool:
    """Have glibc map large blocks by themselves and return them when they are freed.

    By itself it raises both limits with the blocks that are freed, to 32 and 64 MiB. The tensors of a step then lie
    between dequantized weights that come and go, and the holes are kept: more than a quantized base saves.

    Returns:
        Whether it does so: not where there is no glibc, or where the environment says how memory is allocated.
    """
    if any(os.environ.get(name) for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    done = [mallopt(which, limit) for which, limit in LIMITS.items()]
    return all(done)
