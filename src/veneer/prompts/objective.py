"""A model's forward whose loss an adapter computes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from ..injection.router import AdapterExpr, adapter_names

if TYPE_CHECKING:
    from ..injection.dispatch import AdaptedState


def state_objective(
    state: AdaptedState, model: nn.Module, live: tuple[AdapterExpr, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A model's forward whose loss an adapter computes, from the logits of virtual and real tokens."""
    assert state.objective is not None
    names = state.router.rows() or tuple(adapter_names(live))
    entry = next((state.objective.entries[n] for n in names if n in state.objective.entries), None)
    if entry is None:
        return state.inner(model, live, args, kwargs)
    method = entry.method
    rows = state.router.rows()
    call = {**dict(zip(inspect.signature(state.base.forward).parameters, (model, *args), strict=False)), **kwargs}
    call.pop("self", None)
    inputs = {name: call.pop(name) for name in method.extra_inputs if name in call}
    labels = call.pop("labels", None)
    if labels is None:
        return state.inner(model, live, (), call)
    as_tuple = call.get("return_dict") is False
    with state.router.hold(whole=True):
        out = state.inner(model, live, (), {**call, "return_dict": True})
    here, wanted = out["logits"].shape[1], method.virtual_tokens + labels.shape[1]
    if rows is not None or here != wanted:
        raise ValueError(
            f"{type(method).__name__} computes its own loss, for {method.virtual_tokens} virtual tokens and {labels.shape[1]} "
            f"labels in each row, and there are {here} logits; call with labels only if it is the one soft prompt of all "
            "rows (no adapter_names, no logits_to_keep)"
        )
    loss = method.objective(out["logits"], labels, inputs)
    made = {**out, "loss": loss, "logits": out["logits"][:, method.virtual_tokens :]}
    out = type(out)(**made)  # anew, so that the loss comes first
    return out.to_tuple() if as_tuple else out
