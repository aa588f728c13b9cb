"""peft.helpers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..io import locate
from .layers import Scaling, is_layer


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or hub id holds an adapter."""
    from ..methods.base import PeftConfig

    if Path(model_name_or_path).is_dir():
        return (Path(model_name_or_path) / locate.CONFIG_NAME).is_file()
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (ValueError, OSError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block, the change of every LoRA is multiplied by a number.

    Raises:
        TypeError: no number.
        ValueError: a model without adapters that have a scale.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier={multiplier!r}: must be a number")
    found = [Scaling(m) for m in model.modules() if is_layer(m)]
    before = [{n: s[n] for n in s} for s in found]
    if not any(before):
        raise ValueError("the model has no adapters with a scale")
    try:
        for scaling, values in zip(found, before, strict=True):
            for name, value in values.items():
                scaling[name] = value * multiplier
        yield
    finally:
        for scaling, values in zip(found, before, strict=True):
            scaling.update(values)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Accepted: Veneer casts an adapter's parameters to its input and never the input."""
    yield


def update_forward_signature(model: object) -> None:
    """Nothing to do: a model's signature is its base's."""


update_generate_signature = update_signature = update_forward_signature
