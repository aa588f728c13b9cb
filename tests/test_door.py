"""Soft prompts in whole models: everything is compared with the same tokens computed by hand in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import veneer
from models import DECODER, IDS, MODELS, SIZES, T5, auto
from small import scramble

P = 3
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40}
BART |= {"dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART |= {"forced_eos_token_id": None}
NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 40, **NO_DROP}

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": MODELS["llama"].make,  # grouped-query attention
    "gpt2": auto("CausalLM", "GPT2Config", **GPT, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": auto("CausalLM", "OPTConfig", **SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=40, dropout=0.0, tie_word_embeddings=False, init_std=0.1),
    "gemma2": auto("CausalLM", "Gemma2Config", **DECODER, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "mistral": auto("CausalLM", "MistralConfig", **DECODER, sliding_window=5),
    "falcon": auto("CausalLM", "FalconConfig", **SIZES, multi_query=True, new_decoder_architecture=False, alibi=False, tie_word_embeddings=False, initializer_range=0.1),  # multi-query
    "gpt_bigcode": auto("CausalLM", "GPTBigCodeConfig", **GPT, n_positions=40, multi_query=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": auto("CausalLM", "GPTNeoXConfig", **SIZES, intermediate_size=48),
    "qwen3_moe": MODELS["qwen3_moe"].make,
    "gpt_oss": MODELS["gpt_oss"].make,  # sinks and sliding windows
    "bloom": auto("CausalLM", "BloomConfig", vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False, initializer_range=0.1),
}  # fmt: skip
SEQ2SEQ: dict[str, Callable[[], nn.Module]] = {
    "t5": auto("Seq2SeqLM", "T5Config", **T5),
    "bart": auto("Seq2SeqLM", "BartConfig", **BART),
}
SMALL = ("llama", "gpt2", "opt", "gemma2", "t5", "bart")
METHODS = {
    "prompt": lambda **o: veneer.PromptTuningConfig(num_virtual_tokens=P, **o),
    "p_tuning": lambda **o: veneer.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=8, **o),
    "prefix": lambda **o: veneer.PrefixTuningConfig(num_virtual_tokens=P, **o),
    "prefix_mlp": lambda **o: veneer.PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8, **o
    ),
}
MAKE = {**CAUSAL, **SEQ2SEQ}


def soft(model: str | nn.Module, method: str, seed: int = 1, **options: Any) -> Any:
    base = MAKE[model]() if isinstance(model, str) else model
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    adapted = veneer.get_peft_model(base, METHODS[method](task_type=task, **options))
    scramble(adapted, seed)
    return adapted.eval()


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    top = max(1.0, b.detach().abs().max().item())
    assert (a - b).abs().max().item() <= limit * top, (a - b).abs().max().item()


def virtual(model: Any, adapter: str = "default") -> tuple[Tensor | None, list[tuple[Tensor, Tensor]] | None]:
    """The adapter's prompt (T, width) and prefix, read through its own hooks at the first stack."""
    site = model.runtime.places[adapter][0]
    method, p = site.entries[adapter].method, site.tensors(adapter)
    if "prompt" in method.hooks:
        return method.prompt(p, site, None).detach(), None
    prefix = method.prefix(p, site).detach()  # (layers, 2, heads, P, width)
    return None, [(k[None], v[None]) for k, v in prefix]


def by_hand(base: Any, front: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Logits of `ids` (batch, n), from virtual tokens written in front of them and one pass without any of ours."""
    prompt, prefix = front
    batch, n = ids.shape
    mask = torch.ones(batch, n, dtype=torch.long) if mask is None else mask
    full = torch.cat([torch.ones(batch, P, dtype=torch.long), mask], 1)
    call: dict[str, Any] = {"attention_mask": full, **options}
    if "position_ids" in options:
        positions = options["position_ids"] + P
        call["position_ids"] = positions
    if prompt is not None:
        embeds = torch.cat([prompt.expand(batch, -1, -1), base.get_input_embeddings()(ids)], 1)
        if "position_ids" in options:
            call["position_ids"] = torch.cat([torch.arange(P).expand(batch, -1), positions], 1)
        return base(inputs_embeds=embeds, use_cache=False, **call).logits[:, P:]
    cache = DynamicCache(config=base.config)
    for i, (k, v) in enumerate(prefix):
        cache.update(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), i)
    return base(input_ids=ids, cache=cache, **call).logits


def greedy_by_hand(base: Any, front: Any, ids: Tensor, steps: int) -> tuple[Tensor, list[Tensor]]:
    """Continue greedily, the whole sequence in one pass for each token: the text, and each step's logits."""
    mask, logits = torch.ones_like(ids), []
    for _ in range(steps):
        where = (mask.cumsum(1) - 1).clamp_min(0)
        options = {"position_ids": where} if "position_ids" in signature(base) else {}
        logits.append(by_hand(base, front, ids, mask, **options)[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids, logits


def signature(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


causal = pytest.mark.parametrize("name", CAUSAL)
every = pytest.mark.parametrize("name", MAKE)
methods = pytest.mark.parametrize("method", METHODS)
two = pytest.mark.parametrize("method", ["prompt", "prefix"])


@methods
@causal
@torch.no_grad()
def test_forward_is_the_same_tokens_by_hand(name: str, method: str) -> None:
    model = soft(name, method)
    base, front = CAUSAL[name](), virtual(model)
    expected = by_hand(base, front, IDS)
    out = model(input_ids=IDS)
    close(out.logits, expected)
    close(model(input_ids=IDS, use_cache=False).logits, expected)
    close(model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, expected)
    close(model(inputs_embeds=base.get_input_embeddings()(IDS)).logits, expected)
    loss = base(input_ids=IDS, labels=IDS).loss
    assert abs(model(input_ids=IDS, labels=IDS).loss - loss) > 1e-6
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, loss)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "falcon"])
def test_a_prefix_can_start_as_real_tokens(name: str) -> None:
    base = CAUSAL[name]()
    config = veneer.PrefixTuningConfig(num_virtual_tokens=P, init_weights="vocabulary", task_type="CAUSAL_LM")
    torch.manual_seed(3)
    model = veneer.get_peft_model(base, config).eval()
    torch.manual_seed(3)
    tokens = torch.randint(0, 64, (1, P)).expand(2, -1)
    expected = CAUSAL[name]()(input_ids=torch.cat([tokens, IDS], 1)).logits[:, P:]
    close(model(input_ids=IDS).logits, expected)
    with pytest.raises(ValueError, match="leave one of the two out"):
        veneer.PrefixTuningConfig(init_weights="vocabulary", prefix_projection=True)


@two
@causal
@torch.no_grad()
def test_padding_on_either_side(name: str, method: str) -> None:
    model = soft(name, method)
    base, front = CAUSAL[name](), virtual(model)
    right = torch.ones_like(IDS)
    right[1, -4:] = 0
    got, expected = model(input_ids=IDS, attention_mask=right).logits, by_hand(base, front, IDS, right)
    close(got[right.bool()], expected[right.bool()])
    close(got[1:, :8], by_hand(base, front, IDS[1:, :8]))  # padding changes nothing
    left = torch.ones_like(IDS)
    left[1, :4] = 0
    if "position_ids" in signature(base):
        where = (left.cumsum(1) - 1).clamp_min(0)
        got = model(input_ids=IDS, attention_mask=left, position_ids=where).logits
        close(got[left.bool()], by_hand(base, front, IDS, left, position_ids=where)[left.bool()])
        if name not in ("mistral", "gemma2", "gpt_oss"):  # a window counts padding as tokens, in the base model too
            close(got[1:, 4:], by_hand(base, front, IDS[1:, 4:]), 3e-5)


@two
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_four_dimensional_masks_and_positions(name: str, method: str, kind: str) -> None:
    base = CAUSAL[name]()
    base.set_attn_implementation(kind)
    model = soft(base, method)
    front = virtual(model)
    seen = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    seen[1, :, :, :3] = False  # the second row has no first three tokens
    seen[1, :, :3] = torch.eye(3, 12, dtype=torch.bool)
    mask = seen if kind == "sdpa" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    flat = torch.ones_like(IDS)
    flat[1, :3] = 0
    where = (flat.cumsum(1) - 1).clamp_min(0)
    got = model(input_ids=IDS, attention_mask=mask, position_ids=where).logits
    with model.disable_adapter():
        expected = by_hand(base, front, IDS, flat, position_ids=where)
    close(got[flat.bool()], expected[flat.bool()])


@two
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_sequences_each_see_the_prompt(name: str, method: str, kind: str) -> None:
    base = CAUSAL[name]()
    base.set_attn_implementation(kind)
    model = soft(base, method)
    where = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    got = model(input_ids=IDS, position_ids=where, use_cache=False).logits
    front = virtual(model)
    with model.disable_adapter():
        for row, cut in ((0, 5), (1, 8)):
            for part in (slice(0, cut), slice(cut, 12)):
                close(got[row : row + 1, part], by_hand(base, front, IDS[row : row + 1, part]))


@methods
@causal
@torch.no_grad()
def test_greedy_generation(name: str, method: str) -> None:
    model = soft(name, method)
    base, front = CAUSAL[name](), virtual(model)
    ids, options = IDS[:, :5], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **options)
    text, logits = greedy_by_hand(base, front, ids, 8)
    assert torch.equal(out.sequences, text)
    close(torch.stack(out.logits), torch.stack(logits), 2e-5)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), text)
    assert (by_hand(base, front, ids) - base(input_ids=ids).logits).abs().max() > 1e-3, "the prompt says nothing"


@two
@pytest.mark.parametrize("name", [n for n in CAUSAL if n not in ("mistral", "gemma2", "gpt_oss")])
@torch.no_grad()
def test_generation_with_left_padding_is_that_without(name: str, method: str) -> None:
    model = soft(name, method)
    ids = IDS[:, :6]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(both[:1], model.generate(input_ids=ids[:1], **options))
    assert torch.equal(both[1, 3:], model.generate(input_ids=ids[1:, 3:], **options)[0])


@two
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "falcon", "t5", "bart"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "several beams", "several samples"],
)
@torch.no_grad()
def test_beams_and_samples_with_a_cache_are_those_without(name: str, method: str, how: dict[str, Any]) -> None:
    model = soft(name, method)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, **how}
        results.append(model.generate(input_ids=IDS[:, :5], use_cache=use_cache, **options))
    assert torch.equal(*results)


@two
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "gpt_neox", "t5", "bart"])
@torch.no_grad()
def test_static_caches_and_chunks(name: str, method: str) -> None:
    model = soft(name, method)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(input_ids=IDS, **options)
    assert torch.equal(model.generate(input_ids=IDS, cache_implementation="static", **options), expected)
    if name in CAUSAL:
        assert torch.equal(model.generate(input_ids=IDS, prefill_chunk_size=5, **options), expected)
        static = {"cache_implementation": "static", "prefill_chunk_size": 5}
        assert torch.equal(model.generate(input_ids=IDS, **static, **options), expected)


@two
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
@torch.no_grad()
def test_a_cache_that_the_caller_passes(name: str, method: str) -> None:
    """Token by token, in pieces, on a copy, and after resetting: always what one pass says."""
    model = soft(name, method)
    expected = model(input_ids=IDS, use_cache=False).logits
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)]
    for cache in caches[: 1 if name == "gemma2" else 2]:
        got = [model(input_ids=part, cache=cache).logits for part in IDS.split([4, 1, 1, 3, 3], 1)]
        close(torch.cat(got, 1), expected, 2e-5)
        assert int(cache.get_seq_length()) == 12, "the caller's cache holds real tokens only"
        cache.reset()
        close(model(input_ids=IDS, cache=cache).logits, expected, 2e-5)
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :4], cache=cache)
    twin = copy.deepcopy(cache)
    close(model(input_ids=IDS[:, 4:], cache=twin).logits, expected[:, 4:], 2e-5)
    close(model(input_ids=IDS[:, 4:], cache=cache).logits, expected[:, 4:], 2e-5)
    out = model(input_ids=IDS[:, :4], use_cache=True)
    close(model(input_ids=IDS[:, 4:], cache=out.cache).logits, expected[:, 4:], 2e-5)


@two
@torch.no_grad()
def test_a_cache_of_other_tokens_is_refused(method: str) -> None:
    model = soft("llama", method)
    cache = DynamicCache(config=model.config)
    with model.disable_adapter():
        model(input_ids=IDS[:, :4], cache=cache)
    with pytest.raises(ValueError, match="computed with no soft prompt in front"):
        model(input_ids=IDS[:, 4:], cache=cache)
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :4], cache=cache)
    scramble(model, 9)
    with pytest.raises(ValueError, match="other values of them, in front"):
        model(input_ids=IDS[:, 4:], cache=cache)
    with pytest.raises(TypeError, match="cache is a tuple; pass a transformers Cache"):
        model(input_ids=IDS, cache=((torch.zeros(1), torch.zeros(1)),))


@two
@torch.no_grad()
def test_assisted_decoding(method: str) -> None:
    model = soft("llama", method)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = IDS[:1]
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, prompt_lookup_num_tokens=2, **options), expected)
    helper = CAUSAL["llama"]()
    assert torch.equal(model.generate(input_ids=ids, assistant_model=helper, **options), expected)


@methods
@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_encoder_decoders(name: str, method: str) -> None:
    """Prompts stand before the encoder's tokens, prefixes before the decoder's."""
    model = soft(name, method)
    base, (prompt, prefix) = SEQ2SEQ[name](), virtual(model)
    target = IDS[:, :6].contiguous()
    for mask in (None, torch.tensor([[1] * 12, [1] * 8 + [0] * 4])):
        got = model(input_ids=IDS, attention_mask=mask, decoder_input_ids=target, labels=target)
        full = torch.ones(2, 12, dtype=torch.long) if mask is None else mask
        if prompt is not None:
            embeds = torch.cat([prompt.expand(2, -1, -1), base.get_input_embeddings()(IDS)], 1)
            wide = torch.cat([torch.ones(2, P, dtype=torch.long), full], 1)
            expected = base(inputs_embeds=embeds, attention_mask=wide, decoder_input_ids=target).logits
        else:
            own = DynamicCache(config=base.config)
            for i, (k, v) in enumerate(prefix):
                own.update(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), i)
            cache = EncoderDecoderCache(own, DynamicCache(config=base.config))
            expected = base(input_ids=IDS, attention_mask=full, decoder_input_ids=target, cache=cache).logits
        close(got.logits, expected)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(input_ids=IDS, **options)
    assert torch.equal(with_cache, model.generate(input_ids=IDS, use_cache=False, **options))


@torch.no_grad()
def test_whisper_takes_its_prompt_in_the_decoder() -> None:
    base = MODELS["whisper"].make()
    inputs = {k: v.contiguous() for k, v in MODELS["whisper"].inputs().items()}
    for method in ("prompt", "prefix"):
        model = soft(copy.deepcopy(base), method)
        out = model(**inputs)
        assert out.logits.shape == (2, 6, 64)
        assert not torch.equal(out.logits, base(**inputs).logits)
        options = {"max_new_tokens": 5, "do_sample": False}
        got = model.generate(inputs["input_features"], **options)
        assert torch.equal(got, model.generate(inputs["input_features"], use_cache=False, **options))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
@methods
@pytest.mark.parametrize("name", [*SMALL, "gpt_bigcode", "bloom"])
def test_gradient_checkpointing_changes_no_gradient(name: str, method: str, reentrant: bool, attention: str) -> None:
    found = []
    for checkpoint in (False, True):
        base = MAKE[name]()
        if attention == "sdpa" and name != "gemma2":
            base.set_attn_implementation("sdpa")
        model = soft(base, method).train()
        if checkpoint:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        ids = IDS.clone()
        loss = model(input_ids=ids, labels=ids[:, :6].contiguous() if name in SEQ2SEQ else ids).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain, grads), (checked, others) = found
    close(checked, plain)
    assert grads.keys() == others.keys() and grads
    for key, grad in grads.items():
        assert grad is not None and others[key] is not None, key
        close(others[key], grad)
    assert any(g.abs().sum() > 0 for g in grads.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart"])
@methods
def test_gradient_checkpointing_generates_in_evaluation_mode(name: str, method: str) -> None:
    model = soft(name, method)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(input_ids=IDS, **options)
    model.get_base_model().gradient_checkpointing_enable()
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)
    if name != "gpt2":  # which drops its cache in training mode, in the base model too
        model.train()
        with torch.no_grad():
            assert torch.equal(model.generate(input_ids=IDS, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@methods
def test_the_forward_compiles_whole(name: str, method: str) -> None:
    model = soft(name, method)
    expected = model(input_ids=IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=method != "p_tuning_lstm", backend="aot_eager")
    close(compiled(input_ids=IDS, use_cache=False).logits, expected)
    close(compiled(input_ids=IDS, use_cache=True).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "t5", "bart"])
@two
@torch.no_grad()
def test_rows_of_one_batch_have_their_own_prompts(name: str, method: str) -> None:
    model = soft(name, method)
    longer = P if name in SEQ2SEQ else P + 2
    task = {"task_type": "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"}
    cls = veneer.PromptTuningConfig if method == "prompt" else veneer.PrefixTuningConfig
    model.add_adapter("b", cls(num_virtual_tokens=longer, **task))
    scramble(model, 5)
    ids = torch.cat([IDS, IDS[:1]])
    rows = ["b", "__base__", "default"] if name not in SEQ2SEQ else ["b", "default", "b"]
    inputs = {"decoder_input_ids": ids[:, :5]} if name in SEQ2SEQ else {}
    got = model(input_ids=ids, adapter_names=rows, **inputs).logits
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(input_ids=ids, adapter_names=rows, **options)
    beams = model.generate(input_ids=ids, adapter_names=rows, num_beams=2, **options)
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        if row == "__base__":
            with model.disable_adapter():
                expected = model(input_ids=ids[i : i + 1], **own).logits
                alone = [model.generate(input_ids=ids[i : i + 1], num_beams=n, **options) for n in (1, 2)]
        else:
            model.set_adapter(row)
            expected = model(input_ids=ids[i : i + 1], **own).logits
            alone = [model.generate(input_ids=ids[i : i + 1], num_beams=n, **options) for n in (1, 2)]
        close(got[i : i + 1], expected, 2e-5)
        assert torch.equal(said[i : i + 1], alone[0])
        assert torch.equal(beams[i : i + 1], alone[1])


@torch.no_grad()
def test_rows_can_mix_prompts_prefixes_and_layers() -> None:
    model = soft("llama", "prompt")
    model.add_adapter("prefix", METHODS["prefix"](task_type="CAUSAL_LM"))
    model.add_adapter("lora", veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    scramble(model, 5)
    ids, rows = torch.cat([IDS, IDS]), ["lora", "default", "__base__", "prefix"]
    got = model(input_ids=ids, adapter_names=rows).logits
    for i, row in enumerate(rows):
        if row == "__base__":
            continue
        model.set_adapter(row)
        close(got[i : i + 1], model(input_ids=ids[i : i + 1]).logits, 2e-5)
    with pytest.raises(ValueError, match="no adapter is named 'lor'.*did you mean 'lora'"):
        model(input_ids=ids, adapter_names=["lor"] * 4)
    with pytest.raises(ValueError, match="for 3 rows, but the batch has 4"):
        model(input_ids=ids, adapter_names=["prefix", "default", "default"])


@torch.no_grad()
def test_rows_of_different_lengths_need_positions() -> None:
    model = soft("bart", "prefix")
    model.add_adapter("b", veneer.PrefixTuningConfig(num_virtual_tokens=P + 1, task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="takes no position_ids, so soft prompts of different lengths"):
        model(input_ids=IDS, decoder_input_ids=IDS[:, :4], adapter_names=["b", "default"])


@torch.no_grad()
def test_several_soft_prompts_stand_one_after_another() -> None:
    model = soft("llama", "prompt")
    model.add_adapter("second", METHODS["prompt"](task_type="CAUSAL_LM"))
    scramble(model, 5)
    model.set_adapter(["default", "second"])
    got = model(input_ids=IDS).logits
    base = CAUSAL["llama"]()
    both = [virtual(model, n)[0].expand(2, -1, -1) for n in ("default", "second")]
    embeds = torch.cat([*both, base.get_input_embeddings()(IDS)], 1)
    close(got, base(inputs_embeds=embeds).logits[:, 2 * P :])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(
        model.generate(input_ids=IDS, **options), model.generate(input_ids=IDS, use_cache=False, **options)
    )


TASKS = {
    "SEQ_CLS": ("SequenceClassification", {"labels": torch.tensor([0, 1])}),
    "TOKEN_CLS": ("TokenClassification", {"labels": torch.randint(0, 2, (2, 12))}),
    "QUESTION_ANS": ("QuestionAnswering", {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}),
    "FEATURE_EXTRACTION": ("", {}),
}  # fmt: skip
BODIES = {
    "bert": ("BertConfig", ENCODER),
    "roberta": ("RobertaConfig", ENCODER),
    "llama": ("LlamaConfig", {**DECODER, "pad_token_id": 0}),
    "distilbert": ("DistilBertConfig", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "albert": ("AlbertConfig", {**ENCODER, "embedding_size": 16}),
}


@two
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("task", TASKS)
def test_heads_see_the_callers_positions_only(task: str, body: str, method: str, tmp_path: Any) -> None:
    import transformers

    kind, labels = TASKS[task]
    config, options = BODIES[body]

    def make() -> Any:
        torch.manual_seed(0)
        auto_class = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
        return auto_class.from_config(getattr(transformers, config)(**options), attn_implementation="eager").eval()

    if method == "prefix" and body in ("distilbert", "albert"):
        with pytest.raises(TypeError, match="takes no cache, which a prefix needs"):
            veneer.get_peft_model(make(), METHODS[method](task_type=task))
        return
    model = veneer.get_peft_model(make(), METHODS[method](task_type=task))
    scramble(model)
    model.eval()
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    plain, out = make()(input_ids=IDS, attention_mask=mask, output_hidden_states=True, **labels), None
    out = model(input_ids=IDS, attention_mask=mask, output_hidden_states=True, **labels)
    for key in plain:
        if isinstance(plain[key], Tensor):
            assert out[key].shape == plain[key].shape, key
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    if labels:
        out.loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if p.requires_grad]
        assert all(g is not None for g in grads) and sum(float(g.abs().sum()) for g in grads) > 0
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(make(), tmp_path)
    other = again(input_ids=IDS, attention_mask=mask, **labels)
    key = next(k for k in plain if isinstance(plain[k], Tensor) and plain[k].ndim > 1)
    close(other[key], out[key])


def test_token_types_keep_their_tokens() -> None:
    torch.manual_seed(0)
    base = auto("SequenceClassification", "BertConfig", **ENCODER)()
    model = veneer.get_peft_model(base, METHODS["prompt"](task_type="SEQ_CLS")).eval()
    types = torch.tensor([[0] * 6 + [1] * 6] * 2)
    got = model(input_ids=IDS, token_type_ids=types).logits
    embeds = torch.cat([virtual(model)[0].expand(2, -1, -1), base.get_input_embeddings()(IDS)], 1)
    wide = torch.cat([torch.zeros(2, P, dtype=torch.long), types], 1)
    with model.disable_adapter():
        close(got, base(inputs_embeds=embeds, token_type_ids=wide).logits)


def test_combined_with_layers_in_one_folder(tmp_path: Any) -> None:
    """LoRA, prefix, prompt and bottleneck on one model: trained, saved to one folder, loaded in one call, each off alone."""
    model = soft("llama", "prefix")
    model.add_adapter("words", METHODS["prompt"](task_type="CAUSAL_LM"))
    model.add_adapter("lora", veneer.LoraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("neck", veneer.BottleneckConfig(reduction_factor=4))
    scramble(model, 4)
    names = ["default", "words", "lora", "neck"]
    model.set_adapter(names)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(CAUSAL["llama"](), tmp_path, adapters="all")
    assert again.active_adapters == names
    close(again(input_ids=IDS).logits, expected)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(again.generate(input_ids=IDS, **options), model.generate(input_ids=IDS, **options))
    without = {}
    for off in names:
        again.set_adapter([n for n in names if n != off])
        without[off] = again(input_ids=IDS).logits
        assert (without[off] - expected).abs().max() > 1e-4, off
    again.delete_adapter("words")
    again.set_adapter(["default", "lora", "neck"])
    close(again(input_ids=IDS).logits, without["words"])
    plain = again.unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in CAUSAL["llama"]().modules()]
    assert torch.equal(plain(input_ids=IDS).logits, CAUSAL["llama"]().requires_grad_(False)(input_ids=IDS).logits)


def test_bad_input_is_refused_and_changes_nothing() -> None:
    gpt2 = CAUSAL["gpt2"]()
    with pytest.raises(ValueError, match="num_virtual_tokens=40: GPT2Model has 40 positions"):
        veneer.get_peft_model(gpt2, veneer.PromptTuningConfig(num_virtual_tokens=40))
    assert type(gpt2.transformer) is type(CAUSAL["gpt2"]().transformer) and gpt2.lm_head.weight.requires_grad
    model = veneer.get_peft_model(gpt2, veneer.PromptTuningConfig(num_virtual_tokens=30))
    with pytest.raises(ValueError, match="30 virtual tokens and 12 tokens are more than the 40 positions"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="acts on activations and cannot be merged"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="config of Linear has none of num_hidden_layers.*give num_layers"):
        veneer.get_peft_model(nn.Linear(2, 2), veneer.PromptTuningConfig())
    sizes = {"token_dim": 2, "num_layers": 1, "num_attention_heads": 1}
    for base in (nn.Linear(2, 2), MODELS["vit"].make()):
        with pytest.raises(ValueError, match="no module that takes inputs_embeds.*adapts layers, such as LoraConfig"):
            veneer.get_peft_model(base, veneer.PromptTuningConfig(**sizes))
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        soft("llama", "prefix")(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 5, 12]))
    with pytest.raises(ValueError, match="key-value heads of width"):
        veneer.get_peft_model(
            CAUSAL["llama"](), veneer.PrefixTuningConfig(num_virtual_tokens=2, token_dim=24, num_attention_heads=3)
        )(input_ids=IDS)
    with pytest.raises(ValueError, match="needs tokenizer_name_or_path"):
        veneer.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    with pytest.raises(ValueError, match=r"num_virtual_tokens=0\): must be a whole number"):
        veneer.PromptTuningConfig(num_virtual_tokens=0)


@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
@torch.no_grad()
def test_prompts_in_either_stack_of_an_encoder_decoder(name: str, kind: str, where: str, tmp_path: Any) -> None:
    model = soft(name, kind, virtual_tokens_in=where)
    base, target = SEQ2SEQ[name](), IDS[:, :6].contiguous()
    site = model.runtime.places["default"][0]
    method, p = site.entries["default"].method, site.tensors("default")
    table = p["embedding"] if kind == "prompt" else method.table(p, training=False)
    first, second = table[:P].expand(2, -1, -1), table[P:].expand(2, -1, -1)
    embed, ones = base.get_input_embeddings(), torch.ones(2, P, dtype=torch.long)
    mask = torch.tensor([[1] * 12, [1] * 8 + [0] * 4])
    call: dict[str, Any] = {"input_ids": IDS, "attention_mask": mask, "decoder_input_ids": target}
    if where != "decoder":
        call |= {"inputs_embeds": torch.cat([first, embed(IDS)], 1), "attention_mask": torch.cat([ones, mask], 1)}
        del call["input_ids"]
    if where != "encoder":
        words = torch.cat([first if where == "decoder" else second, embed(target)], 1)
        call["decoder_inputs_embeds"] = words
        del call["decoder_input_ids"]
    expected = base(use_cache=False, **call).logits[:, -6:]
    close(model(input_ids=IDS, attention_mask=mask, decoder_input_ids=target).logits, expected)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    said = model.generate(input_ids=IDS, attention_mask=mask, **options)
    assert torch.equal(said, model.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(SEQ2SEQ[name](), tmp_path)
    assert again.peft_config["default"].virtual_tokens_in == where
    close(again(input_ids=IDS, attention_mask=mask, decoder_input_ids=target).logits, expected)


@methods
def test_copies_and_pickles(method: str) -> None:
    import io

    model = soft("llama", method)
    expected = model(input_ids=IDS).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(input_ids=IDS).logits, expected)
        scramble(twin, 8)
        assert not torch.equal(twin(input_ids=IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert twin.get_model_status().trainable_params == model.get_nb_trainable_parameters()[0]


@two
def test_threads_have_their_own_prompts(method: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = soft("llama", method)
    model.add_adapter("b", METHODS[method](task_type="CAUSAL_LM"))
    scramble(model, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run(name: str) -> Tensor:
        with model.use_adapter(name):
            return model.generate(input_ids=IDS, **options)

    alone = {n: run(n) for n in ("default", "b")}
    assert not torch.equal(alone["default"], alone["b"]) or method == "prefix"
    names = ["default", "b"] * 4
    with ThreadPoolExecutor(4) as pool:
        for name, got in zip(names, pool.map(run, names), strict=True):
            assert torch.equal(got, alone[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@methods
def test_half_precision_bases_keep_the_prompt_in_float32(method: str, dtype: torch.dtype) -> None:
    model = soft(CAUSAL["llama"]().to(dtype), method)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.dtype == dtype and bool(out.logits.isfinite().all())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
