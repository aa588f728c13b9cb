"""torch's fused inference path of nn.TransformerEncoderLayer.

In evaluation mode it reads the weights of its sublayers and never calls them, so adapters inside it would
silently not run. It declines an unknown activation, so an unknown one is put in.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

SAVED = "_veneer_activation"


def disable_fastpath(root: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """Turn the fused path off in every encoder layer that holds an adapted layer."""
    inside = {id(m) for m in adapted}
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and SAVED not in module.__dict__:
            if any(id(m) in inside for m in module.modules()):
                module.__dict__[SAVED] = module.activation_relu_or_gelu
                module.activation_relu_or_gelu = 0


def restore_fastpath(root: nn.Module) -> None:
    """Undo `disable`."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and SAVED in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop(SAVED)
