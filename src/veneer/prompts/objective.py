"""A model's forward whose loss an adapter computes."""

from __future__ import annotations

import inspect
from typing import Any

from ..injection.interceptors import Args, Call, Kwargs, OneSite, Proceed
from ..injection.router import adapter_names


class ModelObjective(OneSite):
    """Computes the loss of a model by its adapter, from the logits of virtual and real tokens."""

    order = 30

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        assert self.site is not None
        rows = call.router.rows()
        entries = self.site.entries
        entry = next(entries[n] for n in rows or tuple(adapter_names(call.live)) if n in entries)
        method = entry.method
        names = tuple(inspect.signature(call.base.forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = {name: given.pop(name) for name in method.extra_inputs if name in given}
        labels = given.pop("labels", None)
        if labels is None:
            return proceed((), given)
        as_tuple = given.get("return_dict") is False
        with call.router.hold(whole=True):
            out = proceed((), {**given, "return_dict": True})
        here, wanted = out["logits"].shape[1], method.virtual_tokens + labels.shape[1]
        if rows is not None or here != wanted:
            raise ValueError(
                f"{type(method).__name__} computes its own loss, for {method.virtual_tokens} virtual tokens and "
                f"{labels.shape[1]} labels in each row, and there are {here} logits; call with labels only if it is the one "
                "soft prompt of all rows (no adapter_names, no logits_to_keep)"
            )
        loss = method.objective(out["logits"], labels, inputs)
        made = {**out, "loss": loss, "logits": out["logits"][:, method.virtual_tokens :]}
        out = type(out)(**made)  # anew, so that the loss comes first
        return out.to_tuple() if as_tuple else out
