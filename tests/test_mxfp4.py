"""gpt-oss' experts in mxfp4, in the layout in which transformers' kernels hold them, on a CPU.

The kernels' package comes from the hub and is not here, so the tests hold its tensors in doubles of its own data classes.
What is not run is its product; it has no gradient, and no adapters.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations import mxfp4 as library
from transformers.integrations.mxfp4 import FP4_VALUES, Mxfp4GptOssExperts, Mxfp4GptOssMLP

import veneer
from small import scramble
from test_experts import Watch
from veneer.backends import backend_of
from veneer.backends.deferred import Deferred

HIDDEN, INNER, EXPERTS = 64, 96, 4
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip
ATTENTION = ["q_proj", "v_proj"]
WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(12).view(2, 6)


class Strided:
    """The kernels' plain layout."""

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data


class Reversed:
    """A layout in which the data lie in another order, as the ones for some GPUs do."""

    def unswizzle_data(self, data: Tensor) -> Tensor:
        return data.flip(-1)


@dataclass
class Storage:
    data: Tensor
    layout: Any


@dataclass
class KernelTensor:
    storage: Storage
    shape: Any = None


def held(data: Tensor, layout: Any) -> KernelTensor:
    """A checkpoint's bytes or exponents (experts, out, n), as `swizzle_mxfp4` has them: n before out."""
    turned = data.mT if isinstance(layout, Strided) else data.mT.flip(-1)
    return KernelTensor(Storage(turned, layout))


def random_parts(out: int, into: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (EXPERTS, out, into // 32, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(118, 124, (EXPERTS, out, into // 32), generator=generator).to(torch.uint8)
    return blocks, scales


def experts(config: GptOssConfig, seed: int, layout: Any) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """Loaded experts, and what the checkpoint held."""
    generator = torch.Generator().manual_seed(seed)
    made = Mxfp4GptOssExperts(config)
    parts = {}
    for name, out, into in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        blocks, scales = parts[name] = random_parts(out, into, generator)
        getattr(made, f"{name}_bias").data.normal_(0, 0.1, generator=generator)
        del made._parameters[name]  # as `swizzle_mxfp4_convertops` does
        setattr(made, name, held(blocks.flatten(2), layout))
        setattr(made, f"{name}_precision_config", SimpleNamespace(weight_scale=held(scales, Strided())))
    return made, parts


def pair(layout: Any = None) -> tuple[Any, Any]:
    """A small gpt-oss in mxfp4, and the same with transformers' dequantized weights."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(GptOssConfig(**SIZES)).eval()
    packed = copy.deepcopy(plain)
    for i, (block, other) in enumerate(zip(packed.model.layers, plain.model.layers, strict=True)):
        made, parts = experts(packed.config, i, layout or Strided())
        block.mlp = Mxfp4GptOssMLP(block.mlp.router, made).eval()
        for name, (blocks, scales) in parts.items():
            there = other.mlp.experts
            value = library.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (experts, in, out)
            getattr(there, name).data = value
            getattr(there, f"{name}_bias").data = getattr(made, f"{name}_bias").data.clone()
    return packed, plain


class Floats(Watch):
    """Sees what has as many entries as a weight of all experts, its bytes aside."""

    def large(self, t: Any) -> bool:
        return super().large(t) and t.is_floating_point()


def near(a: Tensor, b: Tensor, bar: float = 1e-5) -> bool:
    return bool((a - b).norm() <= bar * b.norm()) and bool(b.any())


@pytest.mark.parametrize("layout", [Strided(), Reversed()], ids=["strided", "reversed"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_read_is_transformers_own_bit_for_bit(name: str, layout: Any) -> None:
    made, parts = experts(GptOssConfig(**SIZES), 0, layout)
    made.to(torch.bfloat16)
    backend = backend_of(made, name, "experts")
    assert backend.name == "mxfp4" and not backend.can_write(made, name) and backend.dtype(made, name) == torch.bfloat16
    blocks, scales = parts[name]
    value = backend.read(made, name)
    assert torch.equal(value.mT, library.convert_moe_packed_tensors(blocks, scales)) and value.dtype == torch.bfloat16
    by_hand = torch.empty(blocks.shape[1], blocks.shape[2] * 32)  # of the last expert
    for row, at in ((0, 0), (5, 1), (33, 40), (by_hand.shape[0] - 1, by_hand.shape[1] - 1)):
        byte = int(blocks[-1, row, at // 32, at % 32 // 2])
        expected = FP4_VALUES[byte >> 4 if at % 2 else byte & 15] * 2.0 ** (int(scales[-1, row, at // 32]) - 127)
        assert value[-1, row, at] == expected


def test_forward_and_gradient_to_the_input_are_those_of_the_dequantized_model() -> None:
    packed, plain = pair(Reversed())
    config = veneer.LoraConfig(r=4, target_modules=ATTENTION)
    found = []
    for base in (packed, plain):
        torch.manual_seed(1)
        model = veneer.get_peft_model(base, config)
        scramble(model)
        x = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits = model.train()(inputs_embeds=x).logits
        logits.square().mean().backward()
        found.append([logits, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) == 2 + 2 * 2 * 2
    for mine, wanted in zip(*found, strict=True):
        assert near(mine, wanted)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_adapters_of_the_experts(options: dict[str, Any], tmp_path: Any) -> None:
    packed, plain = pair()
    config = veneer.LoraConfig(r=4, target_modules=ATTENTION, target_parameters=WEIGHTS, **options)
    model = veneer.get_peft_model(packed, config)
    scramble(model)
    model.save_pretrained(tmp_path)
    other = veneer.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    found = []
    for each in (model, other):
        out = each.train()(IDS, labels=IDS)
        out.loss.backward()
        named = {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
        found.append({"logits": out.logits, **named})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 1 + 2 * 2 * 4
    for name, wanted in found[1].items():
        assert near(found[0][name], wanted), name
    with model.disable_adapter(), other.disable_adapter():
        assert near(model(IDS).logits, other(IDS).logits)


def test_no_dequantized_weight_of_all_experts_is_made_or_saved() -> None:
    packed, plain = pair()
    model = veneer.get_peft_model(packed, veneer.LoraConfig(r=4, target_modules=[], target_parameters=WEIGHTS))
    x = torch.randn(1, 5, HIDDEN).requires_grad_()
    with Floats(plain) as seen:
        model(inputs_embeds=x).logits.sum().backward()
    assert seen.least == EXPERTS * HIDDEN * INNER and not seen.made and not seen.saved
    with Floats(plain) as seen:  # it would have been seen
        backend_of(packed.model.layers[0].mlp.experts, "down_proj", "").read(
            packed.model.layers[0].mlp.experts, "down_proj"
        )
    assert seen.made


@pytest.mark.parametrize("adapters", [ATTENTION, WEIGHTS], ids=["attention", "experts"])
def test_loss_falls(adapters: list[str]) -> None:
    packed, _ = pair()
    where = (
        {"target_modules": [], "target_parameters": WEIGHTS} if adapters is WEIGHTS else {"target_modules": ATTENTION}
    )
    model = veneer.get_peft_model(packed, veneer.LoraConfig(r=4, **where)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_merging() -> None:
    packed, plain = pair()
    config = veneer.LoraConfig(r=4, target_modules=ATTENTION, target_parameters=WEIGHTS)
    model = veneer.get_peft_model(packed, config)
    scramble(model)
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(ValueError, match=r"experts.*mxfp4 cannot be written.*dequantize=True.*Nothing was merged"):
            model.merge_adapter()
        assert torch.equal(model(IDS).logits, before)
        made = model.merge_and_unload(dequantize=True)
        assert near(made(IDS).logits, before)
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in plain.named_parameters()}


def test_export_is_exact_and_loads_as_a_plain_model(tmp_path: Any) -> None:
    packed, plain = pair()
    model = veneer.get_peft_model(packed, veneer.LoraConfig(r=4, target_modules=ATTENTION))  # which changes nothing yet
    report = veneer.export_dense(model, tmp_path, dtype=torch.float32, inputs={"input_ids": IDS})
    assert report.layers == 2 and report.merged is not None and report.merged < 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert near(loaded.eval()(IDS).logits, plain(IDS).logits)


def test_copies_and_pickles() -> None:
    packed, _ = pair()
    model = veneer.get_peft_model(packed, veneer.LoraConfig(r=4, target_modules=[], target_parameters=WEIGHTS))
    scramble(model)
    y = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, y)


def test_the_librarys_own_forward_runs_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = pair()
    model = veneer.get_peft_model(packed, veneer.LoraConfig(r=4, target_modules=ATTENTION))
    layer = packed.model.layers[0].mlp.experts
    assert type(layer).__name__ == "Mxfp4GptOssExperts"
    asked = []
    monkeypatch.setattr(Mxfp4GptOssExperts, "forward", lambda self, *args: asked.append(args[0].device.type) or args[0])
    x, chosen, weights = torch.randn(3, HIDDEN), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with torch.no_grad():
        layer(x, chosen, weights)
        layer(x.to("meta"), chosen, weights)  # not a CPU
    assert asked == ["meta"]
    assert model is not None


def test_deferred_is_the_weight_in_every_other_use() -> None:
    value = torch.randn(3, 4, 5)
    made: list[Any] = []

    def make(index: int | None, dtype: torch.dtype) -> Tensor:
        made.append(index)
        return (value if index is None else value[index]).to(dtype)

    weight: Any = Deferred(make, value.shape, torch.float32, value.device)
    assert weight.shape == (3, 4, 5) and weight[1].mT.shape == (5, 4) and not made
    x = torch.randn(2, 4, requires_grad=True)
    y = x @ weight[-1]
    assert torch.equal(y, x @ value[-1]) and made == [2]
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, value[-1].sum(-1).expand(2, 4))
    assert made == [2, 2]
    assert torch.equal(weight + 1, value + 1)
    torch.testing.assert_close(torch.bmm(x[None].expand(3, 2, 4), weight), x @ value)
    assert torch.equal(weight[torch.tensor([0, 2])], value[[0, 2]])
    with pytest.raises(IndexError, match="3"):
        weight[3]


def test_what_is_trained_whole_is_refused() -> None:
    packed, _ = pair()
    with pytest.raises(ValueError, match=r"modules_to_save.*experts.*mxfp4"):
        veneer.get_peft_model(packed, veneer.LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["experts"]))


def test_weights_that_were_not_loaded_are_refused() -> None:
    config = veneer.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    root = nn.ModuleDict({"experts": Mxfp4GptOssExperts(GptOssConfig(**SIZES))})
    with pytest.raises(TypeError, match=r"experts\.gate_up_proj.*uint8"):
        veneer.get_peft_model(root, config)
