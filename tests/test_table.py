"""Every method on every layer: the product of the two tables."""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from table import LAYERS, METHODS, NAME, Layer, Model, Row
from veneer.files import adapter_files

EMPTY = nn.Identity()


def tags_of(layer: Layer) -> set[str]:
    tags = set(layer.tags)
    if layer.bare:
        tags |= {"parameter", "bare_name"}
    if "lookup" not in tags:
        tags.add("not_lookup")
    if layer.input().ndim < 3 and "lookup" not in tags:
        tags.add("not_sequence")
    return tags


CELLS = [
    (m, n)
    for m, method in METHODS.items()
    for n, layer in LAYERS.items()
    if not method.not_for & tags_of(layer) and (method.norms or "norm" not in layer.tags)
]
REFUSED = [
    (m, n)
    for m, method in METHODS.items()
    for n, layer in LAYERS.items()
    if method.refused and method.not_for & tags_of(layer) and "norm" not in layer.tags
]
cells = pytest.mark.parametrize(("method", "layer"), CELLS)
MERGING = [c for c in CELLS if METHODS[c[0]].merges]
merging = pytest.mark.parametrize(("method", "layer"), MERGING)


def config_for(method: Row, layer: Layer, name: str = "") -> Any:
    if name == "modules_to_save":
        return method.make(target_modules=["other"])
    return method.make(target_parameters=[layer.bare]) if layer.bare else method.make(target_modules=[NAME])


def base_for(layer: Layer, name: str = "") -> nn.Module:
    torch.manual_seed(0)
    model = Model(layer.make())
    if name == "modules_to_save":
        model.other = nn.Linear(2, 2)
    return model.eval()


def adapted(method: str, layer: str, *, scramble: bool = True) -> Any:
    model = veneer.get_peft_model(base_for(LAYERS[layer], method), config_for(METHODS[method], LAYERS[layer], method))
    if scramble:
        randomise(model)
    return model.eval()


def randomise(model: nn.Module, scale: float = 0.3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-6))


def bits(model: nn.Module) -> dict[str, bytes]:
    return {k: v.reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items() if ":" not in k}


@pytest.mark.parametrize(("method", "layer"), [c for c in CELLS if METHODS[c[0]].identity])
def test_identity_at_start(method: str, layer: str) -> None:
    torch.manual_seed(0)
    x = LAYERS[layer].input()
    expected = base_for(LAYERS[layer], method).requires_grad_(False)(x)
    model = adapted(method, layer, scramble=False)
    assert relative(model(x), expected) <= 1e-6
    randomise(model)
    assert relative(model(x), expected) > 1e-3, "the adapter has no effect"
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("method", "layer"), [c for c in CELLS if c not in MERGING])
def test_what_is_no_weight_refuses_to_merge(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    before, start = model(x), bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="acts on activations and cannot be merged"):
            merge()
    assert bits(model) == start
    assert torch.equal(model(x), before)


@merging
def test_forward_equals_merge_and_unmerge_restores_bits(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    before, start = model(x), bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grouped convolutions say that they are ungrouped
        model.merge_adapter()
        assert relative(model(x), before) <= 2e-5
        model.unmerge_adapter()
    assert bits(model) == start
    assert torch.equal(model(x), before)


@merging
def test_merge_and_unload(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    before = model(x)
    kinds = [type(m) for m in base_for(LAYERS[layer], method).modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    assert [type(m) for m in plain.modules()] == kinds
    assert not [n for n, _ in plain.named_parameters() if ":" in n]
    assert relative(plain(x), before) <= 2e-5


@cells
def test_unload_gives_the_base_back(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    expected = base_for(LAYERS[layer], method).requires_grad_(False)
    plain = adapted(method, layer).unload()
    assert bits(plain) == bits(expected)
    assert torch.equal(plain(x), expected(x))


@cells
def test_gradients_reach_exactly_the_trained_parameters(method: str, layer: str) -> None:
    model = adapted(method, layer).train()
    x = LAYERS[layer].input()
    target = model(x).detach() + 0.1
    (model(x) - target).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("base_model.model.other"):
            continue
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
            assert ":" not in name


@cells
def test_save_load(method: str, layer: str, tmp_path: Any) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(base_for(LAYERS[layer], method), tmp_path)
    assert relative(again(x), model(x)) <= 5e-6  # attention without gradients takes torch's fused path
    own, other = (dict(adapter_files.named_tensors(m)) for m in (model, again))
    assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    assert not any(p.requires_grad for p in again.parameters())


@cells
def test_deepcopy_and_pickle(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    expected = model(x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    for other in (twin, restored):
        assert torch.equal(other(x), expected)
        randomise(other, 0.5, seed=2)  # what happens to a copy stays in the copy
        assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)
        other.merge_adapter() if "grouped" not in LAYERS[layer].tags and METHODS[method].merges else None
        assert torch.equal(model(x), expected)


@cells
def test_compile_without_graph_breaks(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), model(x)) <= 1e-5


# Two full copies of one place exclude each other.
@pytest.mark.parametrize(("method", "layer"), [c for c in CELLS if c[0] not in ("modules_to_save", "tokens")])
def test_two_adapters_stack(method: str, layer: str) -> None:
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    first = model(x)
    model.add_adapter("second", config_for(METHODS[method], LAYERS[layer], method))
    assert torch.equal(model(x), first), "adding an adapter must not activate it"
    randomise(model, 0.2, seed=3)
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    model.set_adapter(["default", "second"])
    both = model(x)
    assert relative(both, first) > 1e-4 and relative(both, second) > 1e-4
    if METHODS[method].merges:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter()
            assert relative(model(x), both) <= 2e-5
            model.unmerge_adapter()
    assert torch.equal(model(x), both)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(x), first)


@pytest.mark.parametrize(("method", "layer"), REFUSED)
def test_refusals_are_clear_and_lose_nothing(method: str, layer: str) -> None:
    base = base_for(LAYERS[layer])
    start, kinds = bits(base), [type(m) for m in base.modules()]
    config = config_for(METHODS[method], LAYERS[layer])
    with pytest.raises(ValueError, match=METHODS[method].refused):
        veneer.get_peft_model(base, config).merge_adapter()
    if re.search("no_bias", str(tags_of(LAYERS[layer]))):
        return  # attaches, and refuses to merge
    assert bits(base) == start and [type(m) for m in base.modules()] == kinds
    assert all(p.requires_grad for p in base.parameters())


# Weights changed side by side: an attention is not linear in its own.
SIDES = [c for c in CELLS if c[0] not in ("modules_to_save", "tokens") and not (c in MERGING and c[1] == "attention")]


@pytest.mark.parametrize(("method", "layer"), SIDES)
def test_side_by_side(method: str, layer: str) -> None:
    """f + sum_i w_i (f_i - f), in the forward and in the merge; and in a branch, a stack."""
    x = LAYERS[layer].input()
    model = adapted(method, layer)
    inner = model.get_base_model().layer  # before the tanh
    for seed, name in enumerate(("second", "third"), 3):
        model.add_adapter(name, config_for(METHODS[method], LAYERS[layer], method))
        randomise(model, 0.2, seed=seed)

    def outputs(chosen: Any) -> torch.Tensor:
        with model.use_adapter(chosen), torch.no_grad():
            return inner(x)

    with model.disable_adapter():
        base = inner(x).detach()
    one, two, both = outputs("default"), outputs("second"), outputs(["second", "third"])
    added = veneer.Parallel("default", ["second", "third"])
    assert relative(outputs(added), one + both - base) <= 1e-5
    mean = veneer.Average("default", "second", weights=[3, 1])
    assert relative(outputs(mean), 0.75 * one + 0.25 * two) <= 1e-5
    model.set_adapter(veneer.Parallel("default", "second"))
    assert relative(inner(x), one + two - base) <= 1e-5
    nested = veneer.Parallel("default", veneer.Average("second", "third"))
    model.set_adapter(nested)
    before = inner(x)
    if METHODS[method].merges and "grouped" not in LAYERS[layer].tags:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter()
            assert relative(inner(x), before) <= 2e-5
            model.unmerge_adapter()
        assert torch.equal(inner(x), before)
