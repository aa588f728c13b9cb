"""Soft prompts where something could go wrong without a word: remembered prompts, rows, unusual models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import veneer
from models import DECODER, IDS, SIZES, auto
from small import scramble
from test_door import CAUSAL, METHODS, SEQ2SEQ, by_hand, close, soft, two, virtual

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


def shapes(values: Any) -> list[Any]:
    return [tuple(v.shape) if isinstance(v, Tensor) else len(v) for v in values]
