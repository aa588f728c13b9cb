"""Helpers of the parity tests: one adapter, two libraries, exchanged through files only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from models import MODELS
from veneer.files import adapter_files

Run = Callable[[Any], tuple[Tensor, Tensor]]


def shake(model: nn.Module, size: float = 0.1) -> None:
    """Move every trained parameter off its start, always by the same amounts."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def make(library: Any, base: nn.Module, config: str, options: dict[str, Any], folder: Path) -> Any:
    """A shaken adapter of `library` on `base`, saved to `folder`."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base, getattr(library, config)(**options))
        shake(model)
        model.save_pretrained(str(folder))
    return model.eval()


def load(library: Any, base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(base, str(folder), is_trainable=True).eval()


def runner(name: str) -> Run:
    """Calls a model of `models.MODELS` on its inputs: (logits, loss)."""

    def run(model: Any) -> tuple[Tensor, Tensor]:
        out = model(**MODELS[name].inputs())
        return out.logits, out.loss

    return run


def peft_named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """peft's trained parameters by their keys in the file, told by their storage and not by their names."""
    owners = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    for key, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if tensor.data_ptr() in owners:
            yield key, owners[tensor.data_ptr()]


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a fraction of the largest value of `b`, so that small tensors count as well."""
    assert a.shape == b.shape, (a.shape, b.shape)
    top = b.abs().max().item()
    return (a - b).abs().max().item() / (top if top > 1e-7 else 1.0)


def output(model: Any, run: Run) -> Tensor:
    with torch.no_grad():
        return run(model)[0]


def compare(ours: Any, theirs: Any, run: Run, limit: float = 1e-5) -> None:
    """Outputs, loss and the gradient of every trained tensor agree, and the same tensors are trained.

    A gradient is measured against its own largest value, so its limit has room for float32's rounding: where peft
    trains a bias in place Veneer adds a change to it, which differs by 1e-5 in float32 and by nothing in float64.
    """
    results = []
    for model in (ours, theirs):
        y, loss = run(model)
        loss.backward()
        results.append((y.detach(), loss.detach()))
    (y, loss), (other, other_loss) = results
    assert gap(y, other) <= limit
    assert abs(loss - other_loss) <= limit * max(1.0, abs(other_loss.item()))
    mine = {k: p for k, p in adapter_files.named_tensors(ours) if p.requires_grad}
    reached = 0
    for key, parameter in peft_named(theirs):
        own = mine.pop(key)  # a KeyError: Veneer does not train it
        none = torch.zeros_like(parameter)
        a, b = (none if p.grad is None else p.grad for p in (own, parameter))
        assert gap(a, b) <= 3 * limit, (key, gap(a, b))
        reached += bool(b.any())
    assert not mine, f"only Veneer trains {sorted(mine)}"
    assert reached, "no gradient reached the adapter: nothing was compared"


def exchange(make_base: Callable[[], nn.Module], config: str, options: dict[str, Any], run: Run, folder: Path) -> None:
    """peft's file in Veneer, Veneer's file in peft and in Veneer, and the two files' keys and shapes."""
    make(peft, make_base(), config, options, folder / "peft")
    theirs = load(peft, make_base(), folder / "peft")
    compare(load(veneer, make_base(), folder / "peft"), theirs, run)
    assert gap(output(theirs, run), output(make_base(), run)) > 1e-5, "the adapter is too small to show a mistake"

    ours = make(veneer, make_base(), config, options, folder / "veneer")
    expected = output(ours, run)
    assert gap(output(load(peft, make_base(), folder / "veneer"), run), expected) <= 1e-5
    assert gap(output(load(veneer, make_base(), folder / "veneer"), run), expected) <= 1e-6
    a, b = (
        {k: v.shape for k, v in load_file(folder / w / "adapter_model.safetensors").items()} for w in ("peft", "veneer")
    )
    # The untouched base weight of a targeted embedding or head, which Veneer leaves out (decision 5).
    assert {k: s for k, s in a.items() if not k.endswith("base_layer.weight")} == b
