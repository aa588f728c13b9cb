"""Training on a quantized base: what has to be said to the model before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ..backends import all_backends, bare_of, prepare_for_gradients
from .watch import watch_next_backward

HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: object,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Freeze a base model, keep what is not quantized in float32, and let gradients through its checkpoints.

    On a CPU what is not quantized is also copied out of the file, which is then no longer mapped into memory.

    It can be called before or after adapters are attached, and checkpointing can be turned on before or after it. The
    first backward is then looked at, as by `veneer.watch`.

    Args:
        model: a transformers model, quantized or not, or a `PeftModel`. Changed in place.
        use_gradient_checkpointing: compute the activations of blocks again in the backward.
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`; {"use_reentrant": False} by default.

    Returns:
        The model.

    Raises:
        ValueError: the model has no gradient checkpointing.
    """
    root: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantized = quantized_layers(root)
    packed = {id(p) for layer in quantized for p in layer._parameters.values()}
    for name, parameter in root.named_parameters():
        if ":" in name:  # an adapter's
            continue
        parameter.requires_grad = False
        if not quantized or id(parameter) in packed or type(parameter) is not nn.Parameter:
            continue
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
        elif type(parameter.data) is Tensor and parameter.device.type == "cpu":
            # safetensors maps the file into memory, and one view of it keeps all the pages that quantizing read.
            parameter.data = parameter.data.clone()
    if use_gradient_checkpointing:
        enable = getattr(root, "gradient_checkpointing_enable", None)
        if enable is None or not getattr(root, "supports_gradient_checkpointing", True):
            raise ValueError(
                f"{type(root).__name__} has no gradient checkpointing; pass use_gradient_checkpointing=False"
            )
        enable(gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    # Checkpoints that are reentrant pass no gradient on unless their input has one; a Trainer may turn them on later.
    if hasattr(root, "enable_input_require_grads"):
        root.enable_input_require_grads()
    prepare_for_gradients(root)
    watch_next_backward(root)
    return model


def quantized_layers(root: nn.Module) -> list[nn.Module]:
    """The layers of a model whose weight is stored in another format than plain floating point."""
    found = []
    for module in root.modules():
        kind = layers.kind_of(module)
        mine = kind is not None and any(b.packed and b.matches(module, kind.param) for b in all_backends())
        if mine or bare_of(module):
            found.append(module)
    return found
