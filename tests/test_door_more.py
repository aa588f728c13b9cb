"""Soft prompts where something could go wrong without a word: remembered prompts, rows, unusual models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import veneer
from models import DECODER, IDS, SIZES, auto
from small import scramble
from test_door import CAUSAL, ENCODER, METHODS, SEQ2SEQ, by_hand, close, soft, two, virtual

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HOW = {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("where", ["decoder", "both"])
@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.no_grad()
def test_a_decoder_prompt_is_remembered_for_each_row(name: str, where: str) -> None:
    """It has seen the encoder's output, so its keys and values differ between rows."""
    model = soft(name, "prompt", virtual_tokens_in=where)
    got = [torch.stack(model.generate(input_ids=IDS, use_cache=u, **GREEDY, **HOW).logits) for u in (True, False)]
    close(*got)


def multitask() -> Any:
    config = veneer.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, task_type="CAUSAL_LM")
    model = veneer.get_peft_model(CAUSAL["llama"](), config)
    scramble(model)
    return model.eval()


@torch.no_grad()
def test_caches_of_another_task_adapter_or_none_are_refused() -> None:
    model, cache = multitask(), DynamicCache()
    model(input_ids=IDS[:, :4], cache=cache, task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="other soft prompts"):
        model(input_ids=IDS[:, 4:], cache=cache, task_ids=torch.tensor([2, 1]))
    model, cache = multitask(), DynamicCache()  # a batch of one too, whose prompt looks like that of every row
    model(input_ids=IDS[:1, :4], cache=cache, task_ids=torch.tensor([0]))
    with pytest.raises(ValueError, match="other soft prompts"):
        model(input_ids=IDS[:1, 4:], cache=cache, task_ids=torch.tensor([2]))
    cache.reset()
    got = model(input_ids=IDS[:1], cache=cache, task_ids=torch.tensor([2])).logits
    close(got, model(input_ids=IDS[:1], use_cache=False, task_ids=torch.tensor([2])).logits)
    model = soft("llama", "prompt")
    model.add_adapter("x", METHODS["prompt"](task_type="CAUSAL_LM"))
    model.set_adapter("x")
    cache = DynamicCache()
    model(input_ids=IDS[:, :4], cache=cache)
    model.delete_adapter("x")
    model.add_adapter("x", METHODS["prompt"](task_type="CAUSAL_LM"))
    model.set_adapter("x")
    with pytest.raises(ValueError, match="other soft prompts"):
        model(input_ids=IDS[:, 4:], cache=cache)
    with model.disable_adapter():
        with pytest.raises(ValueError, match=r"the soft prompts \['x'\] in front, and none is active"):
            model(input_ids=IDS[:, 4:], cache=cache)
        cache.reset()
        model(input_ids=IDS[:, :4], cache=cache)
    with pytest.raises(ValueError, match="no soft prompt in front"):
        model(input_ids=IDS[:, 4:], cache=cache)


@pytest.mark.parametrize("method", ["lora", "prompt"])
@torch.no_grad()
def test_rows_have_their_own_full_copies(method: str) -> None:
    make = {"lora": lambda: veneer.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])}
    make["prompt"] = lambda: METHODS["prompt"](task_type="SEQ_CLS")
    base = auto("SequenceClassification", "LlamaConfig", **{**DECODER, "pad_token_id": 0})()
    model = veneer.get_peft_model(base, make[method](), "a")
    model.add_adapter("b", make[method]())
    scramble(model, 3)
    model.eval()
    ids, rows = torch.cat([IDS, IDS[:1]]), ["b", "a", "__base__"]
    got = model(input_ids=ids, adapter_names=rows).logits
    for i, name in enumerate(rows[:2]):
        model.set_adapter(name)
        close(got[i], model(input_ids=ids).logits[i])
    with model.disable_adapter():
        close(got[2], model(input_ids=ids).logits[2])


@two
@torch.no_grad()
def test_falcon_with_grouped_keys_and_gemma3n(method: str) -> None:
    falcon = auto("CausalLM", "FalconConfig", **SIZES, new_decoder_architecture=True, num_kv_heads=2)
    model = soft(falcon(), method)
    close(model(input_ids=IDS).logits, by_hand(falcon(), virtual(model), IDS))


HYBRID = {**DECODER, "layer_types": ["conv", "full_attention"]}
PER_LAYER = {**DECODER, "head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 6}
PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
PER_LAYER |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}


@torch.no_grad()
def test_recurrent_layers() -> None:
    """A prompt goes through them with the sequence; caches and prefixes are refused."""
    make = auto("CausalLM", "Lfm2Config", **HYBRID)
    model = soft(make(), "prompt")
    close(model(input_ids=IDS).logits, by_hand(make(), virtual(model), IDS))
    with pytest.raises(TypeError, match="holds recurrent states.*use_cache=False"):
        model.generate(input_ids=IDS, **GREEDY)
    assert model.generate(input_ids=IDS, use_cache=False, **GREEDY).shape == (2, 17)
    with pytest.raises(TypeError, match="Lfm2Model has layers with recurrent states.*use PromptTuningConfig"):
        soft(make(), "prefix")


@torch.no_grad()
def test_layers_that_read_ids_or_share_their_keys() -> None:
    make = auto("CausalLM", "Gemma3nTextConfig", **PER_LAYER)
    with pytest.raises(TypeError, match="reads the ids of its tokens in every layer"):
        soft(make(), "prompt")
    model = soft(make(), "prefix")
    got = [torch.stack(model.generate(input_ids=IDS, use_cache=u, **GREEDY, **HOW).logits) for u in (True, False)]
    close(*got)


@torch.no_grad()
def test_what_only_tokens_have_is_refused() -> None:
    xlnet = auto("CausalLM", "XLNetConfig", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(ValueError, match="gets perm_mask, something of each token"):
        soft(xlnet(), "prompt").generate(input_ids=IDS, **GREEDY)


@pytest.mark.parametrize("cls", [veneer.PromptTuningConfig, veneer.PrefixTuningConfig])
@pytest.mark.parametrize("body", ["RobertaConfig", "LlamaConfig", "OPTConfig"])
@torch.no_grad()
def test_rows_of_different_lengths_count_positions_as_the_model(body: str, cls: Any) -> None:
    options: dict[str, Any] = {"RobertaConfig": ENCODER, "LlamaConfig": DECODER}.get(body, SIZES)
    if body == "OPTConfig":
        options = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "max_position_embeddings": 40}
    make = auto("TokenClassification" if body == "RobertaConfig" else "CausalLM", body, **options)
    model = veneer.get_peft_model(make(), cls(num_virtual_tokens=3), "a")
    model.add_adapter("b", cls(num_virtual_tokens=5))
    scramble(model, 3)
    model.eval()
    ids, mask = IDS.clamp_min(2), torch.ones_like(IDS)
    if body != "RobertaConfig":
        mask[:, :4] = 0
    got = model(input_ids=ids, attention_mask=mask, adapter_names=["a", "b"]).logits
    for i, name in enumerate("ab"):
        model.set_adapter(name)
        close(got[i, 4:], model(input_ids=ids, attention_mask=mask).logits[i, 4:])
    if body == "RobertaConfig":
        where = torch.arange(2, 14).expand(2, -1)
        close(model(input_ids=ids, position_ids=where).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
@torch.no_grad()
def test_an_encoder_decoder_made_of_two_models(where: str) -> None:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    parts = BertConfig(**ENCODER), BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    base = EncoderDecoderModel(config).eval()
    out = soft(base, "prompt", virtual_tokens_in=where)(input_ids=IDS, labels=IDS[:, :6].contiguous())
    assert out.logits.shape == (2, 6, 64)


@two
@torch.no_grad()
def test_a_cache_filled_by_hand_is_continued_by_a_compiled_step(method: str) -> None:
    model = soft("llama", method)
    expected = model(input_ids=IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for first, then in ((model, compiled), (compiled, model)):
        cache = StaticCache(config=model.config, max_cache_len=20)
        got = [first(input_ids=IDS[:, :11], cache=cache).logits, then(input_ids=IDS[:, 11:], cache=cache).logits]
        close(torch.cat(got, 1), expected)


@two
@torch.no_grad()
def test_packed_sequences_stay_apart_when_compiled(method: str) -> None:
    base = CAUSAL["llama"]()
    base.set_attn_implementation("sdpa")
    model, where = soft(base, method), torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    call = {"input_ids": IDS, "position_ids": where, "use_cache": False}
    torch._dynamo.reset()
    close(torch.compile(model, backend="aot_eager")(**call).logits, model(**call).logits)


@two
@torch.no_grad()
def test_tuples_hold_the_callers_positions_only(method: str) -> None:
    base = CAUSAL["llama"]().model
    model = veneer.get_peft_model(base, METHODS[method](task_type="FEATURE_EXTRACTION")).eval()
    call = {"input_ids": IDS, "output_hidden_states": True, "use_cache": False}
    named, listed = model(**call), model(**call, return_dict=False)
    assert len(listed) == 2 and torch.equal(listed[0], named.last_hidden_state)
    assert [h.shape for h in listed[1]] == [(2, 12, 32)] * 3


def cpt() -> Any:
    config = veneer.CPTConfig(cpt_token_ids=[1, 2, 3], cpt_tokens_type_mask=[1, 2, 4])
    model = veneer.get_peft_model(CAUSAL["llama"](), config, "cpt")
    model.add_adapter("words", METHODS["prompt"](task_type="CAUSAL_LM"))
    scramble(model, 3)
    return model.eval()


def test_an_objective_of_several_prompts_or_rows_is_refused() -> None:
    model = cpt()
    tuple_out = model(input_ids=IDS, labels=IDS, return_dict=False)
    assert torch.equal(tuple_out[0], model(input_ids=IDS, labels=IDS).loss)
    with pytest.raises(ValueError, match="computes its own loss.*no adapter_names, no logits_to_keep"):
        model(input_ids=IDS, labels=IDS, logits_to_keep=4)
    with pytest.raises(ValueError, match="computes its own loss"):
        model(input_ids=IDS, labels=IDS, adapter_names=["cpt", "words"])
    model.set_adapter("words")
    with pytest.raises(ValueError, match="computes its own loss"):
        model(input_ids=IDS, labels=IDS, adapter_names=["cpt", "cpt"])
    model.set_adapter(["words", "cpt"])
    with pytest.raises(ValueError, match="computes its own loss"):
        model(input_ids=IDS, labels=IDS)
    assert model(input_ids=IDS).logits.shape == (2, 12, 64)


def test_looking_at_a_prompt_does_not_move_it() -> None:
    """In evaluation mode a forward with gradients leaves the parameters alone, so a cache can be continued."""
    model, cache = cpt(), DynamicCache()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = model(input_ids=IDS).logits
    parts = [model(input_ids=part, cache=cache).logits for part in IDS.split(6, 1)]
    close(torch.cat(parts, 1), expected)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@torch.no_grad()
def test_one_task_and_one_name_for_each_row() -> None:
    model = multitask()
    assert torch.equal(
        model(input_ids=IDS, task_ids=[0, 1]).logits, model(input_ids=IDS, task_ids=torch.tensor([0, 1])).logits
    )
    ids = torch.cat([IDS, IDS])
    for call in ({"task_ids": torch.tensor([0, 1])}, {"adapter_names": ["default"] * 2}):
        with pytest.raises(ValueError, match="for 2 rows, but the batch has 4; give one for each row"):
            model(input_ids=ids, **call)
        with pytest.raises(ValueError, match="for 2 rows, but the batch has 4; give one for each row"):
            model.generate(input_ids=ids, **call)
    with pytest.raises(ValueError, match="task_ids are torch.float32; give whole numbers"):
        model(input_ids=IDS, task_ids=torch.tensor([0.5, 1.0]))


def test_a_set_that_does_not_load_changes_nothing(tmp_path: Any) -> None:
    model = soft("llama", "prompt")
    model.add_adapter("b", METHODS["prefix"](task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    listed = (tmp_path / "adapters.json").read_text()
    for text in ('{"adapters": ["b", "b"], "active": []}', '{"adapters": ["b"], "active": ["c"]}'):
        (tmp_path / "adapters.json").write_text(text)
        with pytest.raises(ValueError, match="lists an adapter twice, or an active one it does not hold"):
            veneer.PeftModel.from_pretrained(CAUSAL["llama"](), tmp_path, adapters="all")
    (tmp_path / "adapters.json").write_text(listed)
    file = tmp_path / "b" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    base = CAUSAL["llama"]()
    with pytest.raises(ValueError, match="is damaged"):
        veneer.PeftModel.from_pretrained(base, tmp_path, adapters="all")
    assert [type(m) for m in base.modules()] == [type(m) for m in CAUSAL["llama"]().modules()]
    file.write_bytes(whole)
    model.delete_adapter("b")
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(CAUSAL["llama"](), tmp_path, adapters="all")
    assert list(again.peft_config) == ["default"]


def test_trainer_keeps_the_columns_that_methods_take(tmp_path: Any) -> None:
    """It drops every column that is not in the signature of the model's class; CPT's loss would go wrong silently."""
    from transformers import Trainer, TrainingArguments

    config = veneer.CPTConfig(cpt_token_ids=[3, 4, 5, 6], cpt_tokens_type_mask=[1, 2, 3, 4])
    seen: list[set[str]] = []
    rows = [{"input_ids": r, "labels": r, "input_type_mask": [4] * 6 + [0] * 6, "other": 1} for r in IDS.tolist()]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.append(set(batch[0]))
        return {k: torch.tensor([r[k] for r in batch]) for k in batch[0]}

    from datasets import Dataset

    model = veneer.get_peft_model(CAUSAL["llama"](), config)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model, arguments, train_dataset=Dataset.from_list(rows), data_collator=collate).train()
    assert seen and all(s == {"input_ids", "labels", "input_type_mask"} for s in seen)
    import inspect

    assert {"task_ids", "input_type_mask", "cache"} <= set(inspect.signature(type(model).forward).parameters)
