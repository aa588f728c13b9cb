"""Adapters as state dicts, and their training state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import sharding
from ..distributed.sharding import fill_from, gathered, shape_of
from ..io.locate import TRAINING_NAME, load_weights, read_tensors
from ..lifecycle.adapters import Runtime
from ..lifecycle.keys import PREFIX
from ..lifecycle.load_report import AdapterLoadError, Loader, LoadReport
from .adapter_files import adapter_tensors, prefix_of, runtime_on, save_weights


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors under their keys in the file.

    Args:
        model: a PeftModel (keys begin with `base_model.model.`), or a model adapted in place (they do not).
        state_dict: values to take instead of the model's own, by the names of `model.state_dict()`.
        adapter_name: the adapter.
        unwrap_compiled: whether `model` is the result of torch.compile.
        save_embedding_layers: see `adapter_tensors`.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    runtime = runtime_on(model)
    prefix = prefix_of(model)
    found = adapter_tensors(runtime, adapter_name, prefix=prefix, embeddings=save_embedding_layers)
    if state_dict is None:
        return dict(found)
    names = {id(t): n for n, t in model.state_dict(keep_vars=True).items()}
    own = {k: names.get(id(t), "") for k, t in runtime.named_tensors(adapter_name, prefix)}
    return {k: gathered(state_dict[n]) if (n := own.get(k, "")) in state_dict else t for k, t in found.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Copy tensors into an attached adapter, in place, so that an optimizer keeps its parameters.

    Args:
        model: a PeftModel or a model adapted in place.
        peft_model_state_dict: values by their keys in the file, with or without `base_model.model.`.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave tensors of another shape as they are instead of raising.
        low_cpu_mem_usage: accepted; values are never duplicated.
        strict: raise on keys that do not fit; False warns with the same report.

    Raises:
        AdapterLoadError: keys are missing, unexpected or of another shape. Nothing was changed.
    """
    runtime = runtime_on(model)
    if runtime.computes_its_file(adapter_name):
        raise ValueError(
            f"adapter {adapter_name!r}: its file holds what its network computes, which cannot be turned back into the "
            "network; load it as an adapter of its own with load_adapter(folder, name)"
        )
    bare = not any(k.startswith("base_model.") for k in peft_model_state_dict)  # without peft's prefix
    loader = Loader(peft_model_state_dict)
    pairs = []
    for key, own in runtime.named_tensors(adapter_name, "" if bare else PREFIX):
        value = loader.take(key, shape_of(own))
        if value is not None:
            pairs.append((own, value))
    report = loader.report
    report.unexpected = sorted(k for k in loader.left if not k.endswith(".base_layer.weight"))
    if ignore_mismatched_sizes and report.mismatched:
        warnings.warn(f"left as they were: {report.describe()}", stacklevel=2)
        report.mismatched = []
    if not report.clean:
        text = f"adapter {adapter_name!r} does not fit these tensors:\n  {report.describe()}\nLikely cause: {report.cause()}."
        if strict:
            raise AdapterLoadError(text, report)
        warnings.warn(text, stacklevel=2)
    copy_values(pairs)
    _note_new_values(runtime)
    return report


def training_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What is trained of an adapter by its own names, whole and copied. Every process calls it where it is sharded."""
    own = runtime_on(model).training_state(adapter)
    with sharding.gathered_in_place(own.values()):
        return {k: gathered(t.detach()).cpu().contiguous().clone() for k, t in own.items()}


def save_training_state(model: nn.Module, adapter: str, folder: str | os.PathLike[str]) -> None:
    """Write what is trained of an adapter, `adapter_training.safetensors`, also where its file holds what it computes."""
    own = runtime_on(model).training_state(adapter).values()
    state = training_tensors(model, adapter)
    if sharding.writes_file(own):
        save_weights(state, folder, name=TRAINING_NAME)
    sharding.wait_for_all(own)


def load_training_state(model: nn.Module, adapter: str, folder: str | os.PathLike[str]) -> None:
    """Copy what `save_training_state` wrote into an attached adapter, in place.

    Raises:
        AdapterLoadError: it was written for another adapter. Nothing was changed.
        ValueError: there is no such file, or it is damaged.
    """
    state = runtime_on(model).training_state(adapter)
    loader = Loader(read_tensors(Path(folder) / TRAINING_NAME))
    pairs = [(own, loader.take(key, shape_of(own))) for key, own in state.items()]
    loader.report.unexpected = sorted(loader.left)
    if not loader.report.clean:
        raise AdapterLoadError(
            f"{folder}: does not fit adapter {adapter!r}:\n  {loader.report.describe()}", loader.report
        )
    copy_values(pairs)  # type: ignore[arg-type]  # nothing is missing
    _note_new_values(runtime_on(model))


def _note_new_values(runtime: Runtime) -> None:
    """Tell what watches the steps of training that values were copied in."""
    from ..training.steps import driver_of

    driver = driver_of(runtime)
    if driver is not None:
        driver.forget_values()


def copy_values(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy whole values into tensors, in place."""
    with torch.no_grad(), sharding.gathered_in_place([own for own, _ in pairs], change=True):
        for own, value in pairs:
            fill_from(own, value)


def load_peft_weights(model_id: str, device: str | None = None, **hf_hub_download_kwargs: Any) -> dict[str, Tensor]:
    """Read an adapter's tensors from a folder or a hub id; see `load_weights`."""
    return load_weights(model_id, device=device, **hf_hub_download_kwargs)
