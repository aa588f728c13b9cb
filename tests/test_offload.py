"""accelerate's dispatch, before and after attaching: equal outputs, and never silently the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import veneer
from small import IDS, deviation, llama, lora

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
WAYS = ["resident", "cpu", "disk"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "copy": {"modules_to_save": ["lm_head"]},
}


def dispatched(model: Any, way: str, folder: Path) -> Any:
    if way == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    place = {n: "disk" if way == "disk" and ("layers" in n or n == "lm_head") else "cpu" for n in PARTS}
    return dispatch_model(model, device_map=place, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.fixture(params=CONFIGS)
def saved(request: Any, tmp_path: Path) -> Any:
    model = lora(llama(tie_word_embeddings=False), **CONFIGS[request.param])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(IDS).logits.detach()


@pytest.mark.parametrize("way", WAYS)
def test_attach_after_dispatch(way: str, saved: Any, tmp_path: Path) -> None:
    folder, expected = saved
    base = dispatched(llama(tie_word_embeddings=False), way, tmp_path)
    plain = base(IDS).logits
    model = veneer.PeftModel.from_pretrained(base, folder)
    assert deviation(model(IDS).logits, expected) <= 1e-5
    assert deviation(plain, expected) > 0.001
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain)
    model.merge_adapter()
    assert deviation(model(IDS).logits, expected) <= 1e-5
    model.unmerge_adapter()
    assert deviation(model(IDS).logits, expected) <= 1e-5
    assert torch.equal(model.unload()(IDS).logits, plain)


@pytest.mark.parametrize("way", WAYS)
def test_attach_before_dispatch(way: str, saved: Any, tmp_path: Path) -> None:
    folder, expected = saved
    model = veneer.PeftModel.from_pretrained(llama(tie_word_embeddings=False), folder)
    dispatched(model.get_base_model(), way, tmp_path)
    assert deviation(model(IDS).logits, expected) <= 1e-5
    if way != "resident":  # accelerate owns the adapter's tensors now: it must not seem to train
        model.set_requires_grad("default", True)
        with pytest.raises(RuntimeError, match="dispatch the base model first"):
            model.train()(input_ids=IDS)


@pytest.mark.parametrize("way", WAYS)
def test_trains_after_dispatch(way: str, saved: Any, tmp_path: Path) -> None:
    folder, _ = saved
    base = dispatched(llama(tie_word_embeddings=False), way, tmp_path)
    model = veneer.PeftModel.from_pretrained(base, folder, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_forward_replaced_on_the_instance_keeps_running() -> None:
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    calls = []

    def traced(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.nn.functional.linear(x, self.weight)

    layer.forward = traced.__get__(layer)
    adapted = lora(model)
    out = adapted(IDS).logits
    assert calls and not torch.equal(out, llama()(IDS).logits)
    adapted.unload()
    assert layer.forward.__func__ is traced
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match="attach the adapter first"):
        lora(model)


def test_device_map_auto_on_cpu_and_disk(tmp_path: Path) -> None:
    """As a user loads a model that is too large: what fits stays, the rest is read from disk for each forward."""
    from transformers import AutoModelForCausalLM

    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "disk"
    )
    assert {"cpu", "disk"} <= set(map(str, split.hf_device_map.values()))
    said = []
    for base in (whole, split):
        torch.manual_seed(0)
        model = lora(base).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses = []
        for _ in range(5):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        said.append((losses, model.eval().generate(input_ids=IDS[:1], **options)))
    (losses, ids), (others, other_ids) = said
    assert deviation(torch.tensor(losses), torch.tensor(others)) <= 1e-5 and torch.equal(ids, other_ids)
