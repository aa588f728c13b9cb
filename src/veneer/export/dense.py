"""Plain models from quantized ones: the base dequantized as it was evaluated, with adapters merged into it.

A merge that quantizes again rounds the adapter to the base's grid, where much of it can be lost. Here each quantized
weight becomes a floating-point one, of the values with which its layer computed, and the adapters are merged into that
in float32; the result is rounded once, to the dtype that is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ..backends import backend_of, bare_of
from ..backends.base import Backend
from ..backends.base import held_tensor as held_by
from ..backends.plain import FLOATS
from ..files.adapter_files import base_of
from ..injection.router import AdapterExpr
from ..lifecycle.adapters import Runtime, runtime_of
from ..lifecycle.detach import unload_adapters
from ..lifecycle.merge import unmerge_adapters


@dataclass(frozen=True)
class DenseReport:
    """What an export wrote, and how far its outputs are from those of the quantized model with its adapter.

    Attributes:
        folder: where it is.
        dtype: of the written weights.
        layers: how many quantized layers became plain.
        merged: largest difference of a logit, over the largest logit, before the weights were rounded to `dtype`.
        rounded: the same with the weights that were written, still computed in float32.
    """

    folder: Path
    dtype: torch.dtype
    layers: int
    merged: float | None
    rounded: float | None

    def __str__(self) -> str:
        what = f"{self.folder}: {self.layers} quantized layers written in {str(self.dtype).removeprefix('torch.')}"
        if self.merged is None or self.rounded is None:
            return what
        return f"{what}; logits differ by {self.merged:.1e} of the largest, rounded by {self.rounded:.1e}"


class Held(Backend):
    """A layer's backend during a merge for good: it reads dequantized weights and keeps what is written."""

    name = "held"
    holds = "what a merge makes"

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.written: Tensor | None = None

    def matches(self, owner: nn.Module, param: str) -> bool:
        return self.inner.matches(owner, param)

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        return self.inner.dtype(owner, param)

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        return self.inner.storage(owner, param)

    def read(self, owner: nn.Module, param: str) -> Tensor:
        return self.inner.read(owner, param).float() if self.written is None else self.written

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        self.written = value
        return self

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        self.written = None

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        return self.inner.read(owner, param).float()


def quantized_layers(root: nn.Module) -> dict[str, Backend]:
    """Names of the layers of a model whose weight is not a plain one, with their backends.

    Raises:
        TypeError: a quantized weight that no backend reads; it is named.
    """
    found: dict[str, Backend] = {}
    for name, module in root.named_modules():
        kind = layers.kind_of(module)
        if kind is None:
            odd = {p: v for p, v in module._parameters.items() if v is not None and v.dtype not in FLOATS}
            for param in odd:
                backend_of(module, param, name)
            for param in bare_of(module):
                found[name] = backend_of(module, param, name)
            continue
        if ":" in name:  # an adapter's copy (modules_to_save)
            continue
        backend = backend_of(module, kind.weight_of(module), name)
        if backend.packed:
            found[name] = backend
    return found


def merge_dense(
    root: nn.Module, names: Sequence[AdapterExpr] | None, *, dtype: torch.dtype | None = None, check: bool = False
) -> int:
    """Dequantize a model's layers in place, with adapters merged into them for good and all adapters taken off.

    Args:
        root: the base model.
        names: the adapters to merge, as `merge_and_unload` takes them; None merges none.
        dtype: of the weights that were quantized; None takes that in which each layer computes.
        check: refuse adapters that give weights which are not finite.

    Returns:
        How many layers were quantized.

    Raises:
        TypeError: a quantized weight that no backend reads.
        ValueError: as `merge_and_unload`.
    """
    runtime = runtime_of(root)
    if runtime is not None:
        unmerge_adapters(runtime)
    found = quantized_layers(root)
    held: dict[tuple[nn.Module, str], Held] = {}
    if runtime is not None:
        sites = [s for s in runtime.sites.values() if s.backend is not None and s.backend.packed]
        for site in sites:
            site.backend = held.setdefault((site.owner, site.param), Held(site.backend))
        try:
            unload_adapters(runtime, merge=names, check=check)
        except BaseException:
            for site in sites:
                site.backend = site.backend.inner
            raise
    made: dict[nn.Module, nn.Module] = {}
    for name in found:
        module = root.get_submodule(name)
        made[module] = dense_layer(root, module, name, held, dtype)
    for parent in list(root.modules()):
        for leaf, child in parent._modules.items():
            if child is not None and child in made:
                parent._modules[leaf] = made[child]
    if found:
        forget_quantization(root)
    return len(found)


def dense_layer(
    root: Any, module: nn.Module, name: str, held: Mapping[tuple[nn.Module, str], Held], dtype: torch.dtype | None
) -> nn.Module:
    """A plain layer with the values of a quantized one, or with those that a merge wrote for it."""
    kind = layers.kind_of(module)

    def value_of(param: str) -> Tensor:
        here = held.get((module, param))
        written = None if here is None else here.written
        return backend.read(module, param) if written is None else written

    if kind is None:
        backend = backend_of(module, next(iter(bare_of(module))), name)
        with torch.no_grad():
            return backend.plain(module, root.config.get_text_config(), value_of, dtype)
    param = kind.weight_of(module)
    backend = backend_of(module, param, name)
    dtype = backend.dtype(module, param) if dtype is None else dtype
    with torch.no_grad():
        weight = nn.Parameter(value_of(param).detach().to(dtype, copy=True).contiguous(), requires_grad=False)
        if not kind.packable:  # a layer of torch's own, as an embedding, that holds a quantized tensor
            module._parameters[param] = weight
            return module
        bias = held_by(module, kind.bias)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = weight
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return plain.train(module.training)


def forget_quantization(root: nn.Module) -> None:
    """Take off a model what transformers notes on a quantized one, so that it saves a plain one."""
    quantizer = root.__dict__.get("hf_quantizer")
    if quantizer is not None:
        quantizer.remove_quantization_config(root)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "quantization_method"):
        root.__dict__.pop(flag, None)
    config = getattr(root, "config", None)
    if config is not None and "quantization_config" in vars(config):
        del config.quantization_config


def export_dense(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_names: Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> DenseReport:
    """Write a quantized model with its adapters merged as a plain one, which transformers loads by itself.

    The base is dequantized as it was evaluated and the adapters are merged into that in float32, so nothing is lost but
    by rounding to `dtype`. As after `merge_and_unload`, the model is a plain one without adapters then.

    Args:
        model: a `PeftModel`, or a transformers model with adapters in it.
        folder: where to write; made if it is missing.
        dtype: of the written weights.
        adapter_names: the adapters to merge; None merges the active ones.
        inputs: arguments of the model on which its logits are compared; None takes transformers' `dummy_inputs`.
        check: compare the logits before, after, and rounded. It takes a float32 model's memory.

    Raises:
        TypeError: not a transformers model, or a quantized weight that no backend reads.
        ValueError: as `merge_and_unload`.
    """
    root: Any = base_of(model)
    if not hasattr(root, "save_pretrained"):
        raise TypeError(
            f"export_dense: {type(root).__name__} has no save_pretrained; use merge_and_unload(dequantize=True) and save "
            "its state_dict"
        )
    runtime = Runtime.ensure(root)
    names = runtime.router.chosen if adapter_names is None else tuple(adapter_names)
    merged = rounded = None
    given = dict(root.dummy_inputs if inputs is None else inputs) if check else {}
    root.eval()
    before = None
    if check:
        unmerge_adapters(runtime)
        with runtime.router.choose(tuple(names)):
            before = logits_of(root, given)
    count = merge_dense(root, names, dtype=torch.float32 if check else dtype, check=True)
    if before is not None:
        merged = largest_difference(logits_of(in_dtype(root, torch.float32), given), before)
    in_dtype(root, dtype)
    if before is not None:
        rounded = largest_difference(logits_of(in_dtype(root, torch.float32), given), before)
        in_dtype(root, dtype)
    root.save_pretrained(folder)
    return DenseReport(Path(folder), dtype, count, merged, rounded)


def in_dtype(root: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters; buffers such as frequencies keep the precision in which transformers makes them."""
    for parameter in root.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return root


def logits_of(root: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A model's logits, or its last hidden states where it has none, in float32."""
    device = next(root.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        outputs = root(**moved)
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return found.float()


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, over the largest magnitude of b."""
    return float((a - b).abs().max() / b.abs().max())
