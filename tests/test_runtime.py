"""The life of adapters: switching, merging, deleting, looking."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from small import IDS, bits, deviation, llama, lora, scramble
from veneer.algebra import modes


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_hundred_merges_in_bf16_restore_the_exact_bits(options: dict[str, Any]) -> None:
    base = llama(1, torch.bfloat16, attention_bias=True, mlp_bias=True)
    model = lora(base, **options)
    model.add_adapter("other", veneer.IA3Config())
    scramble(model, 2)
    start, before = bits(model), model(IDS).logits
    for i in range(100):
        model.set_adapter(["default", "other"][i % 2])
        model.merge_adapter()
        if i < 2:
            assert bits(model) != start
        model.unmerge_adapter()
        assert bits(model) == start
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, before)


def test_half_precision_base_keeps_float32_parameters_and_casts_no_activation() -> None:
    model = lora(llama(1, torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
    kept = veneer.get_peft_model(llama(1, torch.bfloat16), veneer.LoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in kept.named_parameters() if "lora_" in n} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert lora()(IDS).logits.dtype == torch.bfloat16


def test_active_is_not_trainable() -> None:
    model = lora()
    model.add_adapter("frozen", veneer.LoraConfig(inference_mode=True))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any(f for n, f in flags.items() if n.endswith(":frozen"))
    for name in ("frozen", "default", ["default", "frozen"]):
        model.set_adapter(name)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    model.set_requires_grad("frozen", True)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith(":frozen"))


def test_the_config_is_copied() -> None:
    config = veneer.LoraConfig(r=4, target_modules=["q_proj"])
    model = veneer.get_peft_model(llama(), config)
    config.lora_alpha = 400
    assert model.peft_config["default"].lora_alpha == 8


def test_threads_use_different_adapters() -> None:
    model = lora()
    model.add_adapter("b", veneer.LoraConfig(r=4, init_lora_weights=False))
    model.set_adapter("b")
    expected = {"b": model(IDS).logits}
    model.set_adapter("default")
    expected["default"] = model(IDS).logits
    wrong: list[str] = []
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(30):
            with model.use_adapter(name), torch.no_grad():
                if deviation(model(IDS).logits, expected[name]) > 1e-6:
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert model.active_adapters == ["default"]


def test_disable_takes_merged_adapters_out_and_puts_them_back() -> None:
    base = llama()(IDS).logits
    model = lora()
    model.merge_adapter()
    merged = model(IDS).logits
    with model.disable_adapter():
        assert deviation(model(IDS).logits, base) <= 1e-5
    assert torch.equal(model(IDS).logits, merged)
    assert model.get_model_status().merged_adapters == ["default"]


def test_switching_while_merged_is_refused() -> None:
    model = lora()
    model.add_adapter("b", veneer.LoraConfig())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.set_adapter("b")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()


def test_merging_a_tied_weight_unties_and_says_so() -> None:
    base = llama(tie_word_embeddings=True)
    head = base.lm_head.weight
    start = head.detach().clone()
    model = lora(base, target_modules=["embed_tokens"])
    expected = model(IDS).logits
    with pytest.warns(UserWarning, match="tied"):
        model.merge_adapter()
    assert deviation(model(IDS).logits, expected) <= 1e-5
    assert torch.equal(base.lm_head.weight, start)
    model.unmerge_adapter()
    assert base.model.embed_tokens.weight is base.lm_head.weight is head
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    assert deviation(plain(IDS).logits, expected) <= 1e-5


def test_safe_merge_refuses_what_is_not_finite_and_loses_nothing() -> None:
    model = lora()
    with torch.no_grad():
        last = [p for n, p in model.named_parameters() if "lora_B" in n][-1]
        last.fill_(float("nan"))
    start = bits(model)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert bits(model) == start
    assert model.get_model_status().merged_adapters == []


def test_delete_the_active_adapter() -> None:
    model = lora()
    model.add_adapter("b", veneer.LoraConfig())
    with pytest.warns(UserWarning, match="'b' is active now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    model.delete_adapter("b")
    assert not [n for n, _ in model.named_parameters() if ":" in n]
    assert torch.equal(model(IDS).logits, llama().requires_grad_(False)(IDS).logits)


def test_names_and_state_of_the_base_stay_true() -> None:
    plain = llama()
    names, shapes = [n for n, _ in plain.named_modules()], plain.state_dict().keys()
    model = lora(plain, modules_to_save=None)
    assert [n for n, _ in plain.named_modules()] == names
    assert {k for k in plain.state_dict() if ":" not in k} == set(shapes)
    layer = plain.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear" and layer.weight.shape == (32, 32)
    assert "model.layers.0.self_attn.q_proj.lora_A:default" in plain.state_dict()
    assert model.base_model.model is plain and model.get_base_model() is plain and model.config is plain.config


def test_status() -> None:
    model = lora()
    status = model.get_model_status()
    assert status.num_adapter_layers == 14 and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True} and status.peft_types == {"default": "LORA"}
    layer = model.get_layer_status()[0]
    assert layer.name == "model.model.layers.0.self_attn.q_proj" and layer.devices == {"default": ["cpu"]}
    with model.disable_adapter():
        assert not model.get_model_status().enabled


def test_generate_uses_the_active_adapters() -> None:
    model = lora(seed=5)
    out = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with model.disable_adapter():
        plain = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == plain.shape == (1, 15) and not torch.equal(out, plain)
    assert torch.equal(plain, llama().generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_before_attaching(reentrant: bool) -> None:
    plain = llama()
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = lora(plain).train()
    reference = lora().train()
    for m in (model, reference):
        m(input_ids=IDS, labels=IDS).loss.backward()
    for (n, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None and deviation(a.grad, b.grad) <= 1e-5, n


def test_dropout_acts_in_training_only() -> None:
    model = lora(lora_dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    torch.manual_seed(3)
    first = model(IDS).logits
    torch.manual_seed(3)
    assert torch.equal(model(IDS).logits, first)


def test_torch_encoder_fast_path_does_not_skip_the_adapters() -> None:
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = plain(x)
        model = lora(plain, target_modules=["linear1", "self_attn"], inference_mode=True, init_lora_weights=False)
        assert deviation(model(x), before) > 0.001
        assert torch.allclose(model.unload()(x), before)
    assert plain.activation_relu_or_gelu == 1


def test_pissa_leaves_the_base_alone() -> None:
    start = bits(llama())
    model = veneer.get_peft_model(llama(), veneer.LoraConfig(r=4, init_lora_weights="pissa"))
    assert bits(model.get_base_model()) == start
    assert deviation(model(IDS).logits, llama()(IDS).logits) <= 1e-5
    with modes.reference_only():
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)


def test_inject_in_place() -> None:
    plain = llama()
    model = veneer.inject_adapter_in_model(veneer.LoraConfig(r=2, init_lora_weights=False), plain, "mine")
    assert model is plain
    state = veneer.get_peft_model_state_dict(plain, adapter_name="mine")
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    expected = plain(IDS).logits
    other = veneer.inject_adapter_in_model(veneer.LoraConfig(r=2), llama(), "mine")
    assert veneer.set_peft_model_state_dict(other, state, "mine").clean
    assert torch.allclose(other(IDS).logits, expected)
    third = veneer.inject_adapter_in_model(veneer.LoraConfig(r=2), llama(), "mine", state_dict=state)
    assert torch.allclose(third(IDS).logits, expected)


def test_two_copies_of_one_module_exclude_each_other() -> None:
    model = lora(modules_to_save=["norm"])
    model.add_adapter("b", veneer.LoraConfig(modules_to_save=["lm_head", "norm"]))
    with pytest.raises(ValueError, match="'default' and 'b' both bring a full copy"):
        model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default"]


@pytest.mark.slow
def test_many_loads_switches_and_deletes_leave_nothing_behind(tmp_path: Any) -> None:
    model = lora(modules_to_save=["lm_head"], trainable_token_indices=[1])
    model.save_pretrained(tmp_path)
    expected = model(IDS).logits
    names = [n for n, _ in model.named_parameters()]
    layers = [type(m) for m in model.modules()]
    for i in range(300):
        model.load_adapter(tmp_path, f"n{i}")
        model.set_adapter(f"n{i}")
        if i % 20 == 0:
            assert deviation(model(IDS).logits, expected) <= 1e-5
        model.set_adapter("default")
        model.delete_adapter(f"n{i}")
    assert [n for n, _ in model.named_parameters()] == names
    assert [type(m) for m in model.modules()] == layers
    assert len(model.runtime.sites) == len(model.runtime.layers)
    assert torch.equal(model(IDS).logits, expected)


def test_transformers_trainer_takes_the_model(tmp_path: Any) -> None:
    """It finds inputs and labels by the signature; a column too many is dropped."""
    import inspect

    import datasets
    from transformers import Trainer, TrainingArguments

    model = lora()
    assert type(model).__name__ == "PeftModelForCausalLM" and isinstance(model, veneer.PeftModel)
    assert inspect.signature(model.forward).parameters.keys() >= {"input_ids", "labels"}
    row = {"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist(), "note": 1}
    rows = datasets.Dataset.from_list([row] * 16)
    arguments = TrainingArguments(str(tmp_path), max_steps=6, learning_rate=1e-2, report_to=[], save_strategy="no",
                                  disable_tqdm=True, use_cpu=True)  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    base = bits(model.get_base_model())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert bits(model.get_base_model()) == base


def test_print_shows_the_adapters_of_layers() -> None:
    """`print(model)` names each layer's adapters and methods, beside what its own class prints."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4), nn.LayerNorm(4))
    plain = repr(model)
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=2, target_modules=["0", "1"]))
    adapted.add_adapter("other", veneer.IA3Config(target_modules=["0"], feedforward_modules=[]))
    shown = repr(model)
    assert "Linear(in_features=4, out_features=4, bias=True, adapters: default (LORA), other (IA3))" in shown
    assert "Embedding(5, 4, adapters: default (LORA))" in shown and shown.count("adapters:") == 2
    assert repr(adapted.unload()) == plain
