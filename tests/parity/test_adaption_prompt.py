"""LLaMA-Adapter against peft: outputs, gradients and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs
import pytest
import torch

import veneer
from models import DECODER, IDS, MODELS, auto

pytestmark = pytest.mark.filterwarnings("ignore")
MAKE = {
    "llama": MODELS["llama"].make,  # grouped queries
    "llama_full": auto("CausalLM", "LlamaConfig", **{**DECODER, "num_key_value_heads": 4}),
    "mistral": auto("CausalLM", "MistralConfig", **DECODER),
    "gpt2": MODELS["gpt2"].make,
}
MORE = {
    name: auto("CausalLM", f"{name.capitalize()}Config", **DECODER, head_dim=8)
    for name in ("qwen2", "qwen3", "gemma", "mixtral")
}


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model(input_ids=IDS, labels=IDS)
    return out.logits, out.loss


def adapted(make: Any, **options: Any) -> Any:
    model = veneer.get_peft_model(make(), veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, **options))
    pairs.shake(model, 0.5)
    return model.eval()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MAKE)
def test_parity(name: str, layers: int, tmp_path: Path) -> None:
    options = {"adapter_len": 5, "adapter_layers": layers, "task_type": "CAUSAL_LM"}
    pairs.exchange(MAKE[name], "AdaptionPromptConfig", options, run, tmp_path)


@pytest.mark.parametrize("name", [*MAKE, *MORE])
def test_identity_at_start_and_the_gate_learns_first(name: str) -> None:
    make = (MAKE | MORE)[name]
    model = veneer.get_peft_model(make(), veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
    assert torch.equal(run(model)[0], run(make())[0])
    run(model)[1].backward()
    grads = {k: t.grad for k, t in veneer.files.adapter_files.named_tensors(model)}
    assert all(g.any() for k, g in grads.items() if k.endswith("gate"))


@pytest.mark.parametrize("name", [*MAKE, *MORE])
def test_generation_is_one_pass(name: str) -> None:
    """What the cache gives a token at a time is what one pass over everything gives."""
    model = adapted((MAKE | MORE)[name])
    said = model.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False)
    best = model(input_ids=said).logits.argmax(-1)
    assert torch.equal(said[:, IDS.shape[1] :], best[:, IDS.shape[1] - 1 : -1])


@pytest.mark.parametrize("name", [*MAKE, *MORE])
def test_queries_are_the_attentions_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens seen by those queries: the adapter's share, worked out from what the attention itself computes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    theirs, ours = [], []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        theirs.append(query)
        return own(module, query, *args, **kwargs)

    model = adapted((MAKE | MORE)[name])
    model.get_base_model().config._attn_implementation = "sdpa"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda t, *a, **k: (ours.append(t), softmax(t, *a, **k))[1])
    run(model)
    prompts = [t for k, t in veneer.files.adapter_files.named_tensors(model) if k.endswith("prompt")]
    attentions = [s.owner for s in model.runtime.places["default"]]
    scores = [s for s in ours if s.shape[-1] == 4 and s.ndim == 4]
    assert len(scores) == len(theirs) == 2
    for score, query, prompt, attention in zip(scores, theirs, prompts, attentions, strict=True):
        d = query.shape[-1]
        if name == "gpt2":
            k = attention.c_attn(prompt).chunk(3, -1)[1].unflatten(-1, (-1, d)).transpose(1, 2)
        else:
            k = attention.k_proj(prompt).unflatten(-1, (-1, d)).transpose(1, 2)
            k = attention.k_norm(k) if name == "qwen3" else k
        k = k.repeat_interleave(query.shape[1] // k.shape[1], 1)
        assert pairs.gap(score, query @ k.transpose(2, 3) / d**0.5) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name: str) -> None:
    grads = []
    for on in (False, True):
        base: Any = MAKE[name]()
        if on:
            base.gradient_checkpointing_enable()
        model = adapted(lambda base=base: base).train()
        run(model)[1].backward()
        grads.append({k: t.grad for k, t in veneer.files.adapter_files.named_tensors(model)})
    assert all(pairs.gap(grads[1][k], g) <= 1e-5 for k, g in grads[0].items())


def test_with_lora_on_its_projections() -> None:
    model = adapted(MAKE["llama"])
    model.add_adapter("lora", veneer.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    alone = run(model)[0]
    model.set_adapter(["default", "lora"])
    both = run(model)[0]
    assert pairs.gap(both, alone) > 1e-4
    model.merge_adapter(["lora"])
    assert pairs.gap(run(model)[0], both) <= 1e-5
    with pytest.raises(ValueError, match="acts on activations"):
        model.merge_adapter(["default"])


BAD: list[Any] = [
    ("llama", {"adapter_layers": 1}, "adapter_len=None"),
    ("llama", {"adapter_len": 3}, "adapter_layers=None"),
    ("llama", {"adapter_len": 3, "adapter_layers": 3}, "the model has 2 attentions named 'self_attn'"),
    ("llama", {"adapter_len": 3, "adapter_layers": 1, "target_modules": "self_atn"}, "did you mean 'self_attn'"),
    ("llama", {"adapter_len": 3, "adapter_layers": 1, "target_modules": "mlp"}, "is no attention"),
    ("t5", {"adapter_len": 3, "adapter_layers": 1}, "model type 't5'"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_input(name: str, options: dict[str, Any], message: str) -> None:
    base = MODELS[name].make()
    with pytest.raises(ValueError, match=message):
        veneer.get_peft_model(base, veneer.AdaptionPromptConfig(**options))
    assert all(p.requires_grad for p in base.parameters())
