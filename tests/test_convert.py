"""Adapters of every method that changes weights, as LoRAs: their outputs, their files under the real peft, their errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import veneer
from models import MODELS
from small import bits, deviation, scramble
from veneer.cli.app import app


def says(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model(**MODELS[name].inputs()).logits  # type: ignore[no-any-return]


def base(name: str) -> Any:
    """A tiny model whose outputs depend on every layer by more than rounding; its biases are not zero."""
    model = MODELS[name].make()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1).add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(name: str, config: str, seed: int = 1, **options: Any) -> Any:
    model = veneer.get_peft_model(base(name), getattr(veneer, config)(**options))
    scramble(model, seed)
    return model.eval()


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
# Method, architecture, options, a rank at which it is exact.
EXACT: list[Any] = [
    ("LoHaConfig", "llama", {**ATTENTION, "r": 2}, 4),
    ("VeraConfig", "llama", {"target_modules": ["q_proj", "o_proj"], "r": 5}, 5),
    ("OFTConfig", "llama", {"target_modules": ["v_proj"], "oft_block_size": 8}, 16),
    ("OFTConfig", "llama", {"target_modules": ["q_proj"], "oft_block_size": 8}, 32),
    ("IA3Config", "llama", {"target_modules": ["o_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, 32),
    ("IA3Config", "bert", {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"],
                           "init_ia3_weights": False}, 32),
    ("LoraConfig", "llama", {"target_modules": ["q_proj"], "r": 3, "use_dora": True}, 32),
    ("LoraConfig", "llama", {"target_modules": ["q_proj"], "r": 3, "init_lora_weights": "pissa"}, 6),
    ("LoraConfig", "gpt2", {"target_modules": ["c_attn", "wte"], "r": 3, "use_rslora": True}, 3),
    ("LoraConfig", "bert", {"target_modules": ["query"], "r": 2, "bias": "all", "modules_to_save": ["pooler"]}, 2),
    ("OFTConfig", "bert", {"target_modules": ["query"], "oft_block_size": 8, "bias": "oft_only"}, 32),
]  # fmt: skip


@pytest.mark.parametrize(("config", "name", "options", "rank"), EXACT)
def test_exact_at_enough_rank(tmp_path: Path, config: str, name: str, options: Any, rank: int) -> None:
    model = adapted(name, config, **options)
    y, start = says(model, name), bits(model.get_base_model())
    assert deviation(y, says(base(name), name)) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = veneer.save_as_lora(tmp_path, model, rank)
    lora, tensors = made
    assert isinstance(lora, veneer.LoraConfig) and lora.r == lora.lora_alpha == rank and made.error < 1e-6
    assert bits(model.get_base_model()) == start and list(model.peft_config) == ["default"]
    ours = veneer.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert deviation(says(ours, name), y) <= 0.0001
    theirs = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert deviation(says(theirs, name), y) <= 0.0001


@pytest.mark.parametrize("method", ["LoHaConfig", "VeraConfig"])
def test_parity_with_peft(tmp_path: Path, method: str) -> None:
    """The same file, the same truncation."""
    ours = adapted("llama", method, target_modules=["q_proj", "o_proj"], r=6)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval()
    for rank in (3, 0.6, 1.0):
        lora, tensors = veneer.convert_to_lora(ours, rank, progressbar=False)
        other, wanted = peft.convert_to_lora(theirs, rank)
        if rank != 1.0:  # where rounding decides the last rank
            assert (lora.r, lora.rank_pattern) == (other.r, other.rank_pattern)
        assert tensors.keys() == wanted.keys()
        for key in tensors:
            if key.endswith("lora_A.weight"):
                B = key.replace("lora_A", "lora_B")
                assert deviation(tensors[B] @ tensors[key], wanted[B] @ wanted[key]) <= 1e-5


def test_the_error_is_what_is_lost(tmp_path: Path) -> None:
    model = adapted("llama", "OFTConfig", target_modules=["q_proj"], oft_block_size=8)
    small, large = (veneer.convert_to_lora(model, r) for r in (4, 16))
    site = model.runtime.places["default"][0]
    method, p = site.adapter("default")
    with torch.no_grad():
        whole = method.right(p, site).rmul(site.weight()) - site.weight()
    for made in (small, large):
        key = f"base_model.model.{site.name}.lora_A.weight"
        low = made[1][key.replace("lora_A", "lora_B")] @ made[1][key]
        assert made.quality[site.name].error == pytest.approx(float((whole - low).norm() / whole.norm()), abs=1e-4)
    assert 0.1 < large.error < small.error < 1
    by_energy = veneer.convert_to_lora(model, 0.9)
    assert all(q.error <= (1 - 0.9) ** 0.5 + 1e-6 for q in by_energy.quality.values())
    ranks = {q.rank for q in by_energy.quality.values()}
    assert by_energy[0].r == 1 and set(by_energy[0].rank_pattern.values()) == ranks
    veneer.save_as_lora(tmp_path, model, 0.9)
    read = veneer.PeftModel.from_pretrained(base("llama"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path)
    assert deviation(says(read, "llama"), says(theirs, "llama")) <= 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("config", ["LoHaConfig", "LoraConfig", "IA3Config"])
def test_convolutions(tmp_path: Path, config: str, groups: int) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(8, 6, 1)).eval()

    options: Any = {"feedforward_modules": []} if config == "IA3Config" else {"r": 2}
    model = veneer.get_peft_model(net(), getattr(veneer, config)(target_modules=["0", "2"], **options))
    scramble(model)
    pictures = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        y = model.eval()(pictures)
        made = veneer.save_as_lora(tmp_path, model, 1.0)
        again = veneer.PeftModel.from_pretrained(net(), tmp_path).eval()
        assert deviation(again(pictures), y) <= 0.0001
        assert deviation(y, net()(pictures)) > 0.01 and made.error < 1e-6
        if groups == 1:
            assert deviation(peft.PeftModel.from_pretrained(net(), tmp_path).eval()(pictures), y) <= 0.0001


def test_fused_experts_at_a_lower_rank() -> None:
    model = adapted(
        "mixtral", "LoraConfig", target_parameters=list(MODELS["mixtral"].experts), target_modules=None, r=4
    )
    y = says(model, "mixtral")
    lora, tensors = veneer.convert_to_lora(model, 4)
    again = veneer.get_peft_model(base("mixtral"), lora)
    veneer.set_peft_model_state_dict(again, tensors)
    assert deviation(says(again, "mixtral"), y) <= 0.0001
    made = veneer.convert_to_lora(model, 2)
    assert 0 < made.error < 1 and {q.rank for q in made.quality.values()} == {2}


def test_attention_of_torch_and_an_adapter_in_place(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()

    model = net()
    veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["self_attn", "linear1"], r=3), model)
    scramble(model)
    x = torch.randn(2, 5, 8)
    made = veneer.convert_to_lora(model, 3)
    assert not any(k.startswith("base_model") for k in made[1])
    again = veneer.inject_adapter_in_model(made[0], net(), state_dict=made[1])
    with torch.no_grad():
        assert deviation(again(x), model(x)) <= 1e-5
        veneer.save_as_lora(tmp_path, model, 3)
        assert deviation(veneer.PeftModel.from_pretrained(net(), tmp_path).eval()(x), model(x)) <= 1e-5
        theirs = peft.PeftModel.from_pretrained(
            net(), tmp_path
        ).train()  # in eval, torch takes a path past its adapters
        assert deviation(theirs(x), model(x)) <= 1e-5


def test_merged_weights_and_compiled_decompositions() -> None:
    model = adapted("llama", "LoHaConfig", target_modules=["q_proj"], r=2)
    plain = veneer.convert_to_lora(model, 4)
    model.merge_adapter()
    compiled = veneer.convert_to_lora(model, 4, compile_kwargs={"backend": "eager"})
    assert all(deviation(plain[1][k], v) <= 1e-5 for k, v in compiled[1].items())


def bottleneck() -> Any:
    return adapted("bert", "BottleneckConfig")


CANNOT: list[Any] = [
    (bottleneck, 4, TypeError, "acts on activations"),
    (
        lambda: adapted("llama", "PromptTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM"),
        4,
        TypeError,
        "activations",
    ),
    (lambda: adapted("bert", "LNTuningConfig"), 4, TypeError, "trains a vector"),
    (lambda: adapted("llama", "LoHaConfig", **ATTENTION), 17, ValueError, r"v_proj: rank=17 is above .*, 16"),
    (lambda: adapted("llama", "LoHaConfig", **ATTENTION), 0, ValueError, "rank=0: must be 1 or more"),
    (lambda: adapted("llama", "LoHaConfig", **ATTENTION), 1.5, ValueError, r"must be in \(0, 1\]"),
    (MODELS["llama"].make, 4, ValueError, "has no adapters"),
]


@pytest.mark.parametrize(("make", "rank", "error", "message"), CANNOT)
def test_what_cannot_be_converted(tmp_path: Path, make: Any, rank: Any, error: Any, message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        veneer.save_as_lora(tmp_path / "out", model, rank)
    if isinstance(model, veneer.PeftModel):
        assert model.supports_lora_conversion() == (error is ValueError)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path: Path) -> None:
    plain = base("llama")
    plain.save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(plain, veneer.LoHaConfig(task_type="CAUSAL_LM", r=2, **ATTENTION))
    scramble(model)
    y = says(model.eval(), "llama")
    model.save_pretrained(tmp_path / "loha")
    run = ["convert", str(tmp_path / "loha"), "--rank", "4", "--out", str(tmp_path / "lora")]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 2 and "--model" in done.output  # no base model is named
    done = CliRunner().invoke(app, [*run, "--model", str(tmp_path / "base")])
    assert done.exit_code == 0, done.output
    assert "relative error" in done.output
    again = veneer.PeftModel.from_pretrained(base("llama"), tmp_path / "lora").eval()
    assert deviation(says(again, "llama"), y) <= 0.0001
    again = CliRunner().invoke(app, [*run, "--model", str(tmp_path / "base")])
    assert again.exit_code == 2 and "not empty" in again.output
    assert (
        "whole number"
        in CliRunner().invoke(app, ["convert", "x", "--rank", "big", "--out", str(tmp_path / "o")]).output
    )
