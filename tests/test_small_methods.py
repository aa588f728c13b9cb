"""Norm tuning, bias-only tuning, weighted combinations: what the table and parity do not show."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from models import MODELS
from small import IDS, bits, deviation, llama, scramble
from table import Attention
from veneer.files import adapter_files
from veneer.io import locate

pytestmark = pytest.mark.filterwarnings("ignore:.*tied")


def says(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**MODELS[name].inputs()).logits


def test_biases_are_saved_under_their_own_names(tmp_path: Path) -> None:
    base = MODELS["bert"].make()
    model = veneer.get_peft_model(base, veneer.BitFitConfig())
    model.save_pretrained(tmp_path)
    saved = locate.load_weights(tmp_path)
    wanted = {f"base_model.model.{n}" for n, _ in MODELS["bert"].make().named_parameters() if n.endswith("bias")}
    assert saved.keys() == wanted and len(wanted) == 19
    scramble(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(MODELS["bert"].make(), tmp_path)
    assert torch.equal(says(again, "bert"), says(model.eval(), "bert"))
    # The reference: the same values written into the base model itself.
    plain = MODELS["bert"].make()
    with torch.no_grad():
        for key, value in locate.load_weights(tmp_path).items():
            plain.get_parameter(key.removeprefix("base_model.model.")).copy_(value)
    assert deviation(says(plain, "bert"), says(model, "bert")) <= 1e-5


def test_some_biases_only() -> None:
    def trained(**options: Any) -> set[str]:
        model = veneer.get_peft_model(MODELS["bert"].make(), veneer.BitFitConfig(**options))
        return {k.removeprefix("base_model.model.") for k, _ in adapter_files.named_tensors(model)}

    every = trained()
    queries = {n for n in every if n.endswith("query.bias")}
    assert trained(target_modules=["query"]) == queries and len(queries) == 2
    assert trained(exclude_modules=["query"]) == every - queries
    assert trained(target_modules=r".*layer\.0\..*LayerNorm") == {
        n for n in every if "layer.0" in n and "LayerNorm" in n
    }
    kept = trained(task_type="SEQ_CLS")
    assert "classifier.weight" in kept and len([n for n in kept if n == "classifier.bias"]) == 1


def test_a_packed_bias_of_attention() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Attention(8, 2, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        start = base(x)
    model = veneer.get_peft_model(base, veneer.BitFitConfig()).eval()
    assert {k for k, _ in adapter_files.named_tensors(model)} == {
        "base_model.model.0.in_proj_bias", "base_model.model.0.out_proj.bias",
    }  # fmt: skip
    scramble(model)
    y = model(x)
    assert deviation(y, start) > 0.001
    y.sum().backward()
    assert all(t.grad is not None and t.grad.any() for _, t in adapter_files.named_tensors(model))
    model.merge_adapter()
    assert deviation(model(x), y) <= 1e-5


OTHERS: dict[str, Any] = {
    "ia3": lambda: veneer.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "dora": lambda: veneer.LoraConfig(r=4, use_dora=True, target_modules=["query", "dense"], init_lora_weights=False),
    "lora": lambda: veneer.LoraConfig(r=4, bias="all", init_lora_weights=False),
    "norms": lambda: veneer.LNTuningConfig(target_modules=["LayerNorm"]),
    "bitfit": lambda: veneer.BitFitConfig(target_modules=["query", "LayerNorm"]),
}


@pytest.mark.parametrize(("other", "first"), itertools.product(OTHERS, (True, False)))
def test_biases_stack_with_others_in_their_order(other: str, first: bool) -> None:
    """The forward of a stack is what merging it gives, in either order; each can be turned off alone."""
    base = MODELS["bert"].make()
    start = bits(base)
    alone = {}
    model = veneer.get_peft_model(base, veneer.BitFitConfig(), "biases")
    model.add_adapter("other", OTHERS[other]())
    for seed in range(20):  # far from the start: a small model hardly feels a scale near one
        scramble(model, seed)
    model.eval()
    for name in ("biases", "other"):
        model.set_adapter(name)
        alone[name] = says(model, "bert")
    model.set_adapter(["biases", "other"] if first else ["other", "biases"])
    both = says(model, "bert")
    assert min((both - a).abs().max() for a in alone.values()) > 1e-4
    model.merge_adapter()
    assert deviation(says(model, "bert"), both) <= 1e-5
    model.unmerge_adapter()
    assert bits(model.get_base_model()) == start
    with model.disable_adapter():
        assert torch.equal(says(model, "bert"), says(MODELS["bert"].make(), "bert"))


def test_merging_biases_leaves_weights_alone() -> None:
    base = MODELS["bert"].make()
    before = {n: p.data_ptr() for n, p in base.named_parameters() if n.endswith("weight")}
    model = veneer.get_peft_model(base, veneer.BitFitConfig())
    scramble(model)
    model.merge_adapter()
    plain = dict(model.get_base_model().named_parameters())
    assert all(plain[n].data_ptr() == at for n, at in before.items())


def test_norms_stack_as_sums_of_changes() -> None:
    model = veneer.get_peft_model(llama(), veneer.LNTuningConfig(), "a")
    model.add_adapter("b", veneer.LNTuningConfig())
    scramble(model)
    model.set_adapter(["a", "b"])
    both = model(IDS).logits
    plain = llama()
    values = [dict(adapter_files.named_tensors(model, name)) for name in ("a", "b")]
    with torch.no_grad():
        for key, value in values[0].items():
            own = plain.get_parameter(key.removeprefix("base_model.model.").replace("ln_tuning_layers.", ""))
            own.copy_(value + values[1][key] - own)
    assert deviation(plain(IDS).logits, both) <= 1e-5


def test_norms_in_half_precision() -> None:
    base = llama(2, torch.bfloat16)
    start = bits(base)
    model = veneer.get_peft_model(base, veneer.LNTuningConfig())
    assert {t.dtype for _, t in adapter_files.named_tensors(model)} == {torch.float32}
    plain = llama(2, torch.bfloat16)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    scramble(model)
    y = model(IDS).logits
    assert y.dtype == torch.bfloat16 and not torch.equal(y, plain(IDS).logits)
    model.merge_adapter()
    model.unmerge_adapter()
    assert bits(base) == start and torch.equal(model(IDS).logits, y)


BAD: list[Any] = [
    ("llama", "LNTuningConfig", {"target_modules": "all-linear"}, "train every linear layer in full"),
    ("llama", "LNTuningConfig", {"target_modules": ["input_layernrm"]}, "did you mean 'input_layernorm'"),
    ("llama", "LNTuningConfig", {"target_modules": ["act_fn"]}, "which cannot be adapted; allowed are modules with"),
    ("llama", "LNTuningConfig", {"target_modules": ["mlp", "up_proj"]}, "is inside 'model.layers.0.mlp'"),
    ("llama", "BitFitConfig", {}, "LlamaForCausalLM has no bias to train"),
    ("bert", "BitFitConfig", {"target_modules": ["word_embeddings"]}, "allowed are modules with a bias of their own"),
    ("bert", "BitFitConfig", {"target_modules": ["querry"]}, "did you mean 'query'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "options", "message"), BAD)
def test_bad_input(name: str, config: str, options: dict[str, Any], message: str) -> None:
    base = MODELS[name].make()
    start, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=message):
        veneer.get_peft_model(base, getattr(veneer, config)(**options))
    assert bits(base) == start and [type(m) for m in base.modules()] == kinds
    assert all(p.requires_grad for p in base.parameters())


def test_norm_tuning_refuses_attention() -> None:
    with pytest.raises(ValueError, match="no normalisation of its own"):
        veneer.get_peft_model(nn.Sequential(Attention(8, 2)), veneer.LNTuningConfig(target_modules=["0"]))


def pair(first: Any, second: Any, name: str = "bert") -> Any:
    model = veneer.get_peft_model(MODELS[name].make(), first, "a")
    model.add_adapter("b", second)
    scramble(model)
    return model.eval()


def test_a_weighted_adapter_lives_like_any_other(tmp_path: Path) -> None:
    model = pair(veneer.IA3Config(task_type="SEQ_CLS"), veneer.IA3Config())
    model.add_weighted_adapter(["a", "b"], [0.25, 0.75], "mean")
    model.set_adapter("mean")
    y = says(model, "bert")
    # Its full copy of the head is the one that "a" brings.
    heads = [dict(adapter_files.named_tensors(model, n))["base_model.model.classifier.weight"] for n in ("a", "mean")]
    assert torch.equal(*heads) and heads[0] is not heads[1]
    scramble(model)  # what becomes of the others does not change it
    model.delete_adapter("b")
    model.set_adapter("mean")
    assert torch.equal(says(model, "bert"), y)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    again = veneer.PeftModel.from_pretrained(MODELS["bert"].make(), tmp_path / "mean")
    assert torch.equal(says(again, "bert"), y)
    model.merge_adapter()
    assert deviation(says(model, "bert"), y) <= 1e-5


def test_weighting_one_adapter_by_one_is_that_adapter() -> None:
    model = pair(veneer.IA3Config(), veneer.IA3Config(init_ia3_weights=False))
    model.set_adapter("b")
    y = says(model, "bert")
    model.add_weighted_adapter(["a", "b"], [0.0, 1.0], "only")
    model.set_adapter("only")
    assert torch.equal(says(model, "bert"), y)


QUERY = {"target_modules": ["query"]}
INNER = {"target_modules": ["output.dense"], "feedforward_modules": ["output.dense"]}
OUTER = {"target_modules": ["output.dense"], "feedforward_modules": []}
CANNOT: list[Any] = [
    (("a", "c"), (1, 1), "s", "IA3Config", {}, "IA3Config", {}, "no adapter is named 'c'"),
    (("a", "b"), (1, 1), "a", "IA3Config", {}, "IA3Config", {}, "exists already"),
    (("a", "b"), (1,), "s", "IA3Config", {}, "IA3Config", {}, "2 adapters and 1 weights"),
    ((), (), "s", "IA3Config", {}, "IA3Config", {}, "0 adapters"),
    (("a", "b"), (1, 1), "s", "IA3Config", {}, "LoraConfig", {}, "'a' is IA3, 'b' is LORA"),
    (("a", "b"), (1, 1), "s", "LoHaConfig", QUERY, "LoHaConfig", QUERY, "LOHA: there is no weighted combination"),
    (("a", "b"), (1, 1), "s", "IA3Config", INNER, "IA3Config", OUTER, "their vectors cannot be added"),
    (("a", "b"), (1, 1), "s", "IA3Config", {}, "IA3Config", {"target_modules": ".*key"}, "a regular expression for some"),
    (("a", "b"), (1, 1), "s", "IA3Config", {}, "IA3Config", {"exclude_modules": ["key"]}, "exclude_modules is the same"),
    (("a", "b"), (1, 1), "s", "IA3Config", {"modules_to_save": ["pooler"]}, "IA3Config", {"modules_to_save": ["pooler"]},
     "each bring a full copy of 'bert.pooler'"),
]  # fmt: skip


@pytest.mark.parametrize(("adapters", "weights", "name", "first", "one", "second", "other", "message"), CANNOT)
def test_what_cannot_be_weighted(
    adapters: Any, weights: Any, name: str, first: str, one: Any, second: str, other: Any, message: str
) -> None:
    model = pair(getattr(veneer, first)(**one), getattr(veneer, second)(**other))
    before, y = [n for n, _ in model.named_parameters()], says(model, "bert")
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert [n for n, _ in model.named_parameters()] == before and torch.equal(says(model, "bert"), y)
    assert set(model.peft_config) == {"a", "b"}


def test_feedforward_modules_that_are_no_targets() -> None:
    with pytest.raises(ValueError, match=r"names \['output.dense'\], which are not in target_modules=\['key'\]"):
        veneer.get_peft_model(
            MODELS["bert"].make(), veneer.IA3Config(target_modules=["key"], feedforward_modules=["output.dense"])
        )


def test_norm_tuning_takes_every_norm_where_the_architecture_has_no_default() -> None:
    model = veneer.get_peft_model(MODELS["bert"].make(), veneer.LNTuningConfig())
    sites = {s.name for s in model.runtime.places["default"]}
    norms = {n for n, m in MODELS["bert"].make().named_modules() if type(m).__name__ == "LayerNorm"}
    assert len(norms) == 5 and sites == {f"{n}.{p}" for n in norms for p in ("weight", "bias")}
