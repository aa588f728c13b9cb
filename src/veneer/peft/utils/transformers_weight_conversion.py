"""How transformers brings a file's tensors to the names that they have on a model adapted here.

transformers loads adapters by its own loader, which renames keys by regular expressions. A tensor that a file calls
`layer.lora_A.weight` is the parameter `lora_A:default` of the layer.
"""

from __future__ import annotations

import re
from typing import Any

from ...methods.registry import METHODS


def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """Renamings from a file's keys to the names of parameters, in the order in which they apply.

    Args:
        weight_conversions: the model's own, which rename modules; those that fuse tensors do not concern adapters here.
        adapter_name: the adapter.
        peft_config: its config; None takes the names of all methods.
    """
    from transformers.core_model_loading import WeightRenaming

    made = [WeightRenaming("base_model.model.model.", "model."), WeightRenaming("base_model.model.", "")]
    cls = None if peft_config is None else METHODS.get(str(peft_config.peft_type))
    methods = [cls] if cls is not None else METHODS.values()
    names = {n for m in methods for t in m.tensors.values() for n in (t.name, t.embedding) if n is not None}
    for name in sorted(names, key=len, reverse=True):
        stem = name.removesuffix(".weight").replace(".", "_")
        made.append(WeightRenaming(rf"\.{re.escape(name)}$", f".{stem}:{adapter_name}"))
    return [*made, *(c for c in weight_conversions or [] if type(c) is WeightRenaming)]
