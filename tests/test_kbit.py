"""Training on quantized bases: what has to be prepared, in any order, and what the first step tells."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import veneer
from small import IDS, scramble

STORED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    """A folder with a small Llama."""
    folder: Path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(folder)
    return folder


def stored(folder: Path, how: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**STORED[how]), dtype=dtype
    )


def adapted(base: Any, **options: Any) -> Any:
    return veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules="all-linear", **options))


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n.replace(":", "."): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", STORED)
def test_outputs_and_gradients_are_pefts(how: str, plain: Path, tmp_path: Path) -> None:
    mine = adapted(stored(plain, how))
    scramble(mine)
    mine.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(stored(plain, how), tmp_path, is_trainable=True)
    for model in (mine.train(), theirs.train()):
        loss_of(model).backward()
    with torch.no_grad():
        ours, others = mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    # bfloat16 rounds what the two add in another order.
    bar = 0.02 if how == "nf4_double" else 1e-4
    assert (ours - others).abs().max() <= bar * others.abs().max()
    found, wanted = gradients(mine), gradients(theirs)
    assert len(wanted) == 28
    for name, gradient in wanted.items():
        own = found[name.replace(".default.weight", ".default")]
        assert (own - gradient).abs().max() <= bar * gradient.abs().max(), name


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["prepared first", "attached first", "a Trainer turns it on"])
def test_checkpointing_in_any_order(how: str, reentrant: bool, order: str, plain: Path) -> None:
    kwargs = {"use_reentrant": reentrant}
    base = stored(plain, how)
    if order == "prepared first":
        veneer.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
        model = adapted(base)
    elif order == "attached first":
        model = veneer.prepare_model_for_kbit_training(adapted(base), gradient_checkpointing_kwargs=kwargs)
    else:
        model = adapted(veneer.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False))
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    scramble(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 28 and all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(model.train())
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_what_is_not_quantized_is_in_float32(plain: Path) -> None:
    base = veneer.prepare_model_for_kbit_training(stored(plain, "nf4_double", torch.bfloat16))
    kinds = {type(p).__name__: p.dtype for p in base.parameters()}
    assert kinds == {"Parameter": torch.float32, "Params4bit": torch.uint8}
    assert not any(p.requires_grad for p in base.parameters())


def test_a_plain_model_keeps_its_dtype(plain: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    veneer.prepare_model_for_kbit_training(base)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="use_gradient_checkpointing=False"):
        veneer.prepare_model_for_kbit_training(nn.Linear(2, 2))


def test_the_first_step_names_parameters_without_a_gradient(plain: Path) -> None:
    base = stored(plain, "nf4")
    model = adapted(base).train()
    # All blocks under reentrant checkpoints whose input needs no gradient: nothing would be trained.
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads() if hasattr(base, "_require_grads_hook") else None
    with pytest.raises(RuntimeError, match=r"28 of 28 trained parameters.*q_proj.*enable_input_require_grads"):
        loss_of(model)


def test_the_first_step_names_layers_that_are_cut_off(plain: Path) -> None:
    base = stored(plain, "nf4")
    model = adapted(base).train()
    cut = base.model.layers[0].register_forward_hook(lambda module, args, y: y.detach())
    with pytest.raises(RuntimeError, match=r"14 of 28 trained parameters.*layers\.0\.self_attn\.q_proj"):
        loss_of(model).backward()
    cut.remove()
    loss_of(model).backward()  # it looks once


def test_layers_whose_output_is_not_used_are_named(plain: Path) -> None:
    base = stored(plain, "nf4")
    own = base.model.layers[1].mlp
    own.forward = lambda x: (own.up_proj(x), x)[1]
    model = adapted(base).train()
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj.*leave them out"):
        loss_of(model).backward()


def test_nothing_is_left_after_the_first_step(plain: Path) -> None:
    base = stored(plain, "nf4")
    model = adapted(base).train()
    again = copy.deepcopy(model)
    assert len(base._forward_hooks) == 1
    with torch.no_grad():
        loss_of(model)  # no step
    for one in (model, again):
        loss_of(one).backward()
        root = one.get_base_model()
        assert not root._forward_hooks and not root._forward_pre_hooks
        assert not any(m._forward_hooks for m in one.modules())
        assert not any(p._backward_hooks for p in one.parameters())


def test_layers_that_did_not_run_are_let_be(plain: Path) -> None:
    base = stored(plain, "nf4")
    base.model.layers[1].forward = lambda x, **more: x
    model = adapted(base).train()
    loss_of(model).backward()
    assert sum(p.grad is not None for p in model.parameters()) == 14


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_rows_of_different_adapters(how: str, plain: Path) -> None:
    model = adapted(stored(plain, how))
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    scramble(model)
    model.eval()
    ids = torch.stack([IDS[0], IDS[0].flip(0), IDS[0]])
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["b", "__base__", "default"]).logits
        for row, name in enumerate(["b", None, "default"]):
            if name is None:
                with model.disable_adapter():
                    alone = model(input_ids=ids).logits[row]
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids).logits[row]
            torch.testing.assert_close(mixed[row], alone, atol=2e-3 if how == "int8" else 1e-5, rtol=0)
