"""Starting values as functions of the base weight: W (out, in) fp32, rank, scale -> B (out, r), A (r, in)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .olora import start_olora
from .pissa import start_pissa

START: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"pissa": start_pissa, "olora": start_olora}

__all__ = ["START", "olora", "pissa"]
