"""Layers with slots: y[i] + (x[i] A[s]^T) B[s] for the slot s of each row, in tables that adapters are copied into.

Which slot a row has is a tensor, so a compiled forward is the same whatever adapters the slots hold and the rows use.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..injection.dispatch import AdaptedState
from ..kernels import routed

# On each layer: (S + 1, R, in) and (S + 1, R, out), scales in B, the last slot zero.
A_NAME, B_NAME = "A:slots", "B:slots"
# On the model: the slot of each row (rows,), and how many rows were named ().
INDEX, COUNT = "index:slots", "count:slots"


class SlotTables(Protocol):
    """The slots of a model: the module with their buffers, and which slots the rows of a call have."""

    root: nn.Module
    now: int | routed.Batch | None


class Slotted(AdaptedState):
    """The state of a layer with slots, whose adapters act on what comes after all others."""

    slots: SlotTables

    @property
    def in_use(self) -> bool:
        return True

    @property
    def only_kernel(self) -> bool:
        return False

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = super().run(layer, args, kwargs)
        if not self.router.enabled:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        A, B = layer._buffers[A_NAME], layer._buffers[B_NAME]
        assert A is not None and B is not None
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        if A.dtype != y.dtype:
            A, B = A.to(y.dtype), B.to(y.dtype)
        if is_compiling():
            held = self.slots.root._buffers
            return by_tensor(y, x, A, B, held[INDEX], held[COUNT])  # type: ignore[arg-type]
        return add_slot(y, x, A, B, self.slots.now)


def add_slot(y: Tensor, x: Tensor, A: Tensor, B: Tensor, now: int | routed.Batch | None) -> Tensor:
    """Y (..., out) for x (..., in) as it is, with one slot for all rows, or with one for each. All in one dtype."""
    if now is None:
        return y
    K, N = x.shape[-1], y.shape[-1]
    if isinstance(now, int):
        h, flat = F.linear(x.reshape(-1, K), A[now]), y.reshape(-1, N)  # (M, R), (M, out)
        made = torch.addmm(flat, h, B[now]) if torch.is_grad_enabled() else flat.addmm_(h, B[now])
        return made.view(y.shape)
    if x.shape[0] % now.rows:
        raise ValueError(
            f"slots.rows named {now.rows} rows, and a layer sees {x.shape[0]}; name as many as the batch has"
        )
    z, flat = x.reshape(now.rows, -1, K), y.reshape(now.rows, -1, N)
    strategy = routed.choose_strategy(now, z.shape[1], A.shape[1], K, N, x.dtype, x.device)
    wide = routed.table_dtype(strategy, x.dtype, x.device)
    if A.dtype != wide:  # products of float32 make up for the cast
        A, B = A.to(wide), B.to(wide)
    return routed.ADD[strategy](flat, z, A, B, now).view(y.shape)


def by_tensor(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """The same for slots said by tensors: those of the first `count` of `index`, each for as many rows of x."""
    n, K, S, R = x.shape[0], x.shape[-1], A.shape[0] - 1, A.shape[1]
    slot = index[torch.arange(n, device=x.device) * count // n]  # (n,)
    z = x.reshape(n, -1, K)  # (n, T, in)
    cost = routed.COSTS["cpu" if x.device.type == "cpu" else "cuda", 2 if x.element_size() == 2 else 4]
    if z.shape[1] * S <= cost.rate * cost.copy:  # multiplying by all slots costs less than copying one for each row
        own = (slot[:, None] == torch.arange(S, device=x.device)).to(x.dtype)  # (n, S)
        h = F.linear(z, A[:S].reshape(S * R, K)).view(n, -1, S, R) * own[:, None, :, None]  # (n, T, S, R)
        low: Tensor = h.flatten(2) @ B[:S].reshape(S * R, -1)
    else:
        low = torch.bmm(torch.bmm(z, A[slot].mT), B[slot])  # (n, T, out)
    return y + low.view(y.shape)
