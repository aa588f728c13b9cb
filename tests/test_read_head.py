"""Losses that read `lm_head.weight` without calling the head (TRL's, Liger's) see what adapters make of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import IDS, MODELS
from small import deviation
from veneer import LoraConfig, PeftModel, get_peft_model

LORA = {"r": 2, "target_modules": ["q_proj"]}
CASES = {
    "copy": ("llama", {"modules_to_save": ["lm_head"]}, "copy"),
    "tied rows": ("llama_tied", {"trainable_token_indices": [3, 10, 17]}, "tokens"),
}


@pytest.fixture(params=list(CASES))
def adapted(request: Any) -> tuple[PeftModel, torch.nn.Parameter]:
    """A model whose head has an adapter that was changed, and the trained parameter of the head."""
    name, options, part = CASES[request.param]
    model = get_peft_model(MODELS[name].make(), LoraConfig(**LORA, **options))
    found = next(p for n, p in model.named_parameters() if part in n and p.requires_grad)
    with torch.no_grad():
        found.add_(torch.randn(found.shape, generator=torch.Generator().manual_seed(1)))
    return model, found


def by_weight(model: Any) -> torch.Tensor:
    """Logits from the hidden states and the weight of the head, (batch, length, vocabulary)."""
    hidden = model.get_base_model().model(input_ids=IDS).last_hidden_state  # (batch, length, width)
    return F.linear(hidden, model.get_output_embeddings().weight)


def test_read_weight_is_the_weight_that_runs(adapted: tuple[PeftModel, torch.nn.Parameter]) -> None:
    model, trained = adapted
    logits = model(input_ids=IDS).logits
    assert deviation(by_weight(model), logits) <= 1e-5
    (grad,) = torch.autograd.grad(by_weight(model).square().sum(), trained)
    (wanted,) = torch.autograd.grad(logits.square().sum(), trained)
    assert grad.abs().sum() > 0 and deviation(grad, wanted) <= 0.0001
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
        assert deviation(by_weight(model), base) <= 1e-5
    assert deviation(base, logits) > 0.01


def test_the_base_weight_stays_where_it_is(adapted: tuple[PeftModel, torch.nn.Parameter]) -> None:
    model, _ = adapted
    head = model.get_output_embeddings()
    own = head._parameters["weight"]
    assert dict(head.named_parameters())["weight"] is own and not torch.equal(own, head.weight)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert deviation(by_weight(twin), by_weight(model)) <= 1e-5
    base = model.unload()
    assert base.get_output_embeddings().weight is own


def test_merged(adapted: tuple[PeftModel, torch.nn.Parameter]) -> None:
    model, _ = adapted
    before = model(input_ids=IDS).logits
    model.merge_adapter()
    assert deviation(by_weight(model), before) <= 0.0001
    model.unmerge_adapter()
    assert deviation(by_weight(model), before) <= 1e-5
    plain = model.merge_and_unload()
    assert deviation(plain(input_ids=IDS).logits, before) <= 0.0001


def test_state_dict_holds_the_base(adapted: tuple[PeftModel, torch.nn.Parameter]) -> None:
    """Of the head itself, not what is read."""
    model, _ = adapted
    state = model.state_dict()
    key = next(k for k in state if k.endswith("lm_head.weight") and "copy" not in k)
    assert torch.equal(state[key], model.get_output_embeddings()._parameters["weight"])
