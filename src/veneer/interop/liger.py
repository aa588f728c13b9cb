"""Liger's fused linear cross-entropy, which never holds the logits of a whole batch.

transformers' Trainer applies Liger by itself (`use_liger_kernel`); what is here says with which settings, and refuses
where the loss would silently be another. Hsu et al. 2024, arxiv.org/abs/2410.10989.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch

from ..injection.class_swap import Adapted

FUSED = "fused_linear_cross_entropy"


def loss_only(base: Any) -> dict[str, bool]:
    """`liger_kernel_config` for TrainingArguments: the loss and nothing else.

    Liger's norms and MLPs replace the forward of modules on the instance, and adapters in them would not run.

    Args:
        base: a transformers model with its adapters.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: no GPU, an architecture that Liger has no such loss for, or adapters that this loss would skip.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError(
            "liger=True: Liger's fused cross-entropy needs the package liger-kernel; pip install liger-kernel"
        )
    if not torch.cuda.is_available():
        raise ValueError("liger=True: Liger runs on a GPU and torch finds none; leave it out")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    kind = base.config.model_type
    options = set(inspect.signature(KNOWN[kind]).parameters) if kind in KNOWN else set()
    if FUSED not in options:
        raise ValueError(f"liger=True: Liger has no fused cross-entropy for model type {kind!r}; leave it out")
    for module, what in ((base.get_output_embeddings(), "output head"), (base, "loss")):
        if isinstance(module, Adapted):
            raise ValueError(
                f"liger=True: Liger computes the loss from the base model's own head, and an adapter changes the {what} "
                f"({type(module).__name__}); leave liger out, or leave the {what} as it is"
            )
    return {name: name == FUSED for name in options - {"model"}}
