"""Weighted combinations of LoRA adapters, against what they are and against the real peft on the same files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from models import MODELS
from small import deviation, scramble
from veneer.algebra.low_rank import best_rank, low_rank
from veneer.files import adapter_files

ATTENTION = ["q_proj", "v_proj"]


def adapted(name: str = "llama", *options: dict[str, Any]) -> Any:
    """A model with adapters "a", "b", ... that are not at their start."""
    base = name if isinstance(name, nn.Module) else MODELS[name].make()
    model: Any = None
    for adapter, given in zip("abc", options, strict=False):
        config = veneer.LoraConfig(**{"r": 4, "target_modules": ATTENTION, **given})
        if model is None:
            model = veneer.get_peft_model(base, config, adapter)
        else:
            model.add_adapter(adapter, config)
    scramble(model)
    return model.eval()


def says(model: Any, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return model(**MODELS[name].inputs()).logits  # type: ignore[no-any-return]


def changes(model: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter changes each weight by."""
    found = {}
    for site in model.runtime.places[adapter]:
        if site.kind.whole:
            continue
        method, p = site.adapter(adapter)
        with torch.no_grad():
            found[site.name] = site.kind.delta_matrix(site, method.delta(p, site), site.weight().float()).clone()
    return found


def both(tmp_path: Path, name: str, *options: dict[str, Any]) -> tuple[Any, Any]:
    """The same adapters in Veneer and in peft, from Veneer's files."""
    ours = adapted(name, *options)
    ours.save_pretrained(tmp_path)
    names = "abc"[: len(options)]
    theirs = peft.PeftModel.from_pretrained(MODELS[name].make(), tmp_path / "a", "a")
    for adapter in names[1:]:
        theirs.load_adapter(tmp_path / adapter, adapter)
    return ours, theirs.eval()


# Differences of rank and scale, for the kinds that allow them.
UNLIKE = ({"r": 4, "lora_alpha": 6}, {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]})
ALIKE = ({"lora_alpha": 6}, {"lora_alpha": 3, "target_modules": ["q_proj", "up_proj"]})
KINDS: list[Any] = [
    ("svd", UNLIKE, {}),
    ("svd", UNLIKE, {"svd_rank": 3, "svd_full_matrices": False}),
    ("svd", UNLIKE, {"svd_clamp": 0.9}),
    ("cat", UNLIKE, {}),
    ("linear", ALIKE, {}),
    ("ties", ALIKE, {"density": 0.5}),
    ("ties", ALIKE, {"density": 0.7, "majority_sign_method": "frequency"}),
    ("ties_svd", UNLIKE, {"density": 0.5}),
    ("magnitude_prune", ALIKE, {"density": 0.4}),
    ("magnitude_prune_svd", UNLIKE, {"density": 0.4}),
    ("dare_linear", ALIKE, {"density": 1.0}),  # draws nothing
    ("dare_ties", ALIKE, {"density": 1.0}),
    ("dare_linear_svd", UNLIKE, {"density": 1.0}),
    ("dare_ties_svd", UNLIKE, {"density": 1.0}),
]


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.5, -0.6)])
@pytest.mark.parametrize(("kind", "options", "further"), KINDS)
def test_parity_with_peft(tmp_path: Path, kind: str, options: Any, further: Any, weights: Any) -> None:
    ours, theirs = both(tmp_path, "llama", *options)
    for model in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's about a density of 1
            model.add_weighted_adapter(["a", "b"], list(weights), "mix", kind, **further)
        model.set_adapter("mix")
    y = says(ours)
    assert deviation(y, says(theirs)) <= 1e-5
    ours.set_adapter("a")
    assert deviation(y, says(ours)) > 0.001
    # What is saved is what the real peft reads.
    ours.save_pretrained(tmp_path / "out", selected_adapters=["mix"])
    read = peft.PeftModel.from_pretrained(MODELS["llama"].make(), tmp_path / "out/mix").eval()
    assert deviation(y, says(read)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_parity_on_other_layers(tmp_path: Path, name: str) -> None:
    """Conv1D, and embeddings beside linear layers."""
    targets = ["c_attn", "wte"] if name == "gpt2" else ["query", "word_embeddings"]
    same = {"target_modules": targets}
    ours, theirs = both(tmp_path, name, {**same, "lora_alpha": 2}, same)
    for kind in ("svd", "cat", "linear"):
        for model in (ours, theirs):
            model.add_weighted_adapter(["a", "b"], [0.5, -2.0], kind, kind)
            model.set_adapter(kind)
        assert deviation(says(ours, name), says(theirs, name)) <= 1e-5, kind


def convolutions(groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 3)
    )
    return net.eval()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_on_convolutions(kind: str, groups: int) -> None:
    options = {"target_modules": ["0", "1", "3"], "rank_pattern": {"0": 2}}
    model = adapted(convolutions(groups), options, {**options, "r": 2, "lora_alpha": 5})  # type: ignore[arg-type]
    model.add_weighted_adapter(["a", "b"], [0.5, -1.5], "mix", kind, **({"svd_rank": 6} if kind == "svd" else {}))
    of = {n: changes(model, n) for n in ("a", "b", "mix")}
    for site, total in of["mix"].items():
        want = 0.5 * of["a"][site] - 1.5 * of["b"][site]
        assert deviation(total, want) <= 1e-5, site
    pictures = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        model.set_adapter("mix")
        y = model(pictures)
        model.merge_adapter()
        assert deviation(model(pictures), y) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        ({"use_rslora": True}, {"use_rslora": True, "r": 2}),  # which peft scales by sqrt(r) too much
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}, {"rank_pattern": {"layers.0.v_proj": 7}}),
        ({"init_lora_weights": "pissa"}, {}),
        ({}, {"init_lora_weights": "olora"}, {"r": 1}),
    ],
)
def test_exact_whatever_the_scales(options: Any) -> None:
    model = adapted("llama", *options)
    names, weights = list("abc"[: len(options)]), [0.5, -2.0, 1.0][: len(options)]
    parts = [changes(model, n) for n in names]
    for kind, further in (("cat", {}), ("svd", {"svd_rank": 24})):
        model.add_weighted_adapter(names, weights, kind, kind, **further)
        made = changes(model, kind)
        for site in made:
            want = sum(w * p[site] for w, p in zip(weights, parts, strict=True))
            assert deviation(made[site], want) <= 1e-5, (kind, site)


def test_exact_on_fused_experts() -> None:
    """target_parameters, which peft refuses; one adapter names one parameter of a module, the other both."""
    experts = MODELS["mixtral"].experts
    a = {"target_modules": None, "target_parameters": [experts[1]]}
    b = {"target_modules": None, "target_parameters": list(experts), "r": 2}
    model = adapted("mixtral", a, b)
    parts = [changes(model, n) for n in "ab"]
    for kind, further in (("cat", {}), ("svd", {"svd_rank": 6})):
        model.add_weighted_adapter(["a", "b"], [0.5, -2.0], kind, kind, **further)
        made = changes(model, kind)
        assert made.keys() == parts[0].keys() | parts[1].keys()
        for site, total in made.items():
            want = 0.5 * parts[0].get(site, torch.zeros(())) - 2 * parts[1][site]
            assert deviation(total, want) <= 1e-5, (kind, site)


def test_biases_and_rows_are_added_up(tmp_path: Path) -> None:
    """Y_mix - y = sum_i w_i (y_i - y) holds exactly where only biases and rows of one layer are trained."""
    rows = {"trainable_token_indices": [3, 5]}
    model = adapted("bert", {"target_modules": ["query"], "bias": "lora_only", **rows},
                    {"target_modules": ["query"], "bias": "all", "trainable_token_indices": [5, 9]})  # fmt: skip
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mix", "cat")
    config = model.peft_config["mix"]
    assert config.bias == "all" and config.trainable_token_indices == [3, 5, 9]
    of = {n: dict(adapter_files.named_tensors(model, n)) for n in ("a", "b", "mix")}
    start = dict(model.get_base_model().named_parameters())
    name = "bert.encoder.layer.0.attention.self.query"
    key = f"base_model.model.{name}.base_layer.bias"
    own = start[f"{name}.bias"]
    assert deviation(of["mix"][key] - own, 0.5 * (of["a"][key] - own) + 2 * (of["b"][key] - own)) <= 1e-5
    other = "base_model.model.bert.pooler.dense.bias"  # trained by "b" alone
    own = start[other.removeprefix("base_model.model.")]
    assert deviation(of["mix"][other] - own, 2 * (of["b"][other] - own)) <= 1e-5
    key = next(k for k in of["mix"] if "token_adapter" in k)
    table = start["bert.embeddings.word_embeddings.weight"]
    d = {n: of[n][key] - table[model.peft_config[n].trainable_token_indices] for n in of}
    assert deviation(d["mix"], torch.stack([0.5 * d["a"][0], 0.5 * d["a"][1] + 2 * d["b"][0], 2 * d["b"][1]])) <= 1e-5
    model.set_adapter("mix")
    y = says(model, "bert")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = veneer.PeftModel.from_pretrained(MODELS["bert"].make(), tmp_path / "mix")
    assert torch.equal(says(again, "bert"), y)


def test_added_biases(tmp_path: Path) -> None:
    """lora_bias, which peft leaves out of the combination."""
    model = adapted("bert", {"target_modules": ["query"], "lora_bias": True}, {"target_modules": ["query", "key"]})
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mix", "cat")
    for site in model.runtime.places["mix"]:
        method, p = site.adapter("mix")
        first = site.adapter("a")
        want = 0 if first is None else 0.5 * first[0].shift(first[1], site)
        assert deviation(method.shift(p, site), want * torch.ones(site.fan_out)) <= 1e-5


def test_one_adapter_is_scaled_exactly() -> None:
    model = adapted("llama", {"r": 3})
    model.add_weighted_adapter(["a"], [-1.5], "mix", "ties", density=0.1)  # as in peft, nothing is pruned
    for site, total in changes(model, "mix").items():
        assert deviation(total, -1.5 * changes(model, "a")[site]) <= 1e-5


def test_dare_keeps_the_density_and_the_mean() -> None:
    """The draws cannot be those of peft, entry by entry; what they are drawn from is the same."""
    model = adapted("llama", {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]})
    name = "model.layers.0.self_attn.q_proj"
    whole = changes(model, "a")[name]
    kept, mean = [], torch.zeros_like(whole)
    for seed in range(60):
        torch.manual_seed(seed)
        model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "mix", "dare_linear_svd", density=0.25, svd_rank=32)
        made = changes(model, "mix")[name]
        model.delete_adapter("mix")
        on = made.abs() > 1e-5
        kept.append(float(on.float().mean()))
        assert deviation(made[on], 4 * whole[on]) <= 0.0001
        mean += made / 60
    assert abs(sum(kept) / 60 - 0.25) < 0.01
    # The mean of n draws has a standard error of sqrt((1/d - 1) / n) |entry|.
    assert float((mean - whole).norm() / whole.norm()) < 1.5 * (3 / 60) ** 0.5
    torch.manual_seed(0)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "one", "dare_ties", density=0.5)
    torch.manual_seed(0)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "two", "dare_ties", density=0.5)
    assert all(torch.equal(t, changes(model, "two")[n]) for n, t in changes(model, "one").items())


CANNOT: list[Any] = [
    ({}, {}, {"combination_type": "tie"}, "combination_type='tie': must be one of .*; did you mean 'ties'"),
    ({}, {}, {"combination_type": "ties"}, r"density=None: combination_type='ties' .* must be in \[0, 1\]"),
    ({}, {}, {"combination_type": "dare_linear", "density": 0.0}, r"must be in \(0, 1\]"),
    ({}, {}, {"combination_type": "ties", "density": 1.5}, "density=1.5"),
    ({}, {}, {"svd_rank": 0}, "svd_rank=0: must be a whole number"),
    ({}, {}, {"svd_clamp": 2.0}, "svd_clamp=2.0: is a quantile"),
    ({}, {}, {"combination_type": "ties", "density": 0.5, "majority_sign_method": "sum"}, "'total' or 'frequency'"),
    ({}, {"r": 2}, {"combination_type": "linear"}, r"adapters of one rank; these have \[4, 2\]"),
    ({"use_dora": True}, {}, {}, "convert_to_lora"),
    ({}, {"layers_to_transform": [0]}, {}, "layers_to_transform is the same for all"),
    ({}, {"target_modules": ".*q_proj"}, {}, "a regular expression for some"),
    ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {}, "each bring a full copy of 'lm_head'"),
    ({"trainable_token_indices": [1]}, {"trainable_token_indices": {"embed_tokens": [1]}}, {}, "a dict for others"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "options", "message"), CANNOT)
def test_what_cannot_be_combined(first: Any, second: Any, options: Any, message: str) -> None:
    model = adapted("llama", first, second)
    before, y = [n for n, _ in model.named_parameters()], says(model)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", **options)
    assert [n for n, _ in model.named_parameters()] == before and set(model.peft_config) == {"a", "b"}
    assert torch.equal(says(model), y)


def test_options_of_other_methods_are_refused() -> None:
    model = veneer.get_peft_model(MODELS["bert"].make(), veneer.IA3Config(), "a")
    with pytest.raises(
        ValueError, match="IA3: combining adapters of this method takes weights only; leave density out"
    ):
        model.add_weighted_adapter(["a"], [1.0], "mix", density=0.5)


def test_low_rank_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    B, A = torch.randn(3, 9, 5), torch.randn(3, 5, 7)
    whole = torch.linalg.svd(B @ A)
    for r in (2, 5, 8):
        for X, Y, s in (low_rank(B, A, r), best_rank(B @ A, r)):
            assert X.shape == (3, 9, r) and Y.shape == (3, r, 7)
            error = torch.linalg.matrix_norm(X @ Y - B @ A)
            left = (
                whole.S[:, r:].square().sum(-1).sqrt()
            )  # what no matrix of rank r has; nothing but rounding from 5 on
            assert (error - left).abs().max() <= 1e-5 * whole.S.max()
            assert deviation(s[:, :5], whole.S[:, :5]) <= 1e-5


@pytest.mark.parametrize("config", [veneer.BitFitConfig(), veneer.LNTuningConfig()])
def test_trained_copies_are_added_up(config: Any) -> None:
    model = veneer.get_peft_model(MODELS["bert"].make(), config, "a")
    model.add_adapter("b", config)
    scramble(model)
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "mix")
    of = {n: dict(adapter_files.named_tensors(model, n)) for n in ("a", "b", "mix")}
    start = {f"base_model.model.{n}": p for n, p in model.get_base_model().named_parameters()}
    start |= {re.sub(r"\.(weight|bias)$", r".ln_tuning_layers.\1", n): p for n, p in start.items()}
    assert len(of["mix"]) >= 10
    for key, value in of["mix"].items():
        want = start[key] + 0.5 * (of["a"][key] - start[key]) - 2 * (of["b"][key] - start[key])
        assert deviation(value, want) <= 1e-5, key


DIFFERENT: list[Any] = [  # what decision 5 lists, and how peft 0.21.2 fails at it
    ("llama", {"use_rslora": True}, {"use_rslora": True}, "cat", None),
    (
        "bert",
        {"target_modules": ["query"], "lora_bias": True},
        {"target_modules": ["query"], "lora_bias": True},
        "cat",
        None,
    ),
    (
        "bert",
        {"target_modules": ["query"], "bias": "lora_only"},
        {"target_modules": ["query"]},
        "cat",
        "only 1 adapter with bias",
    ),
    ("llama", {"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 3}}, "linear", "equal size"),
]


@pytest.mark.parametrize(("name", "first", "second", "kind", "message"), DIFFERENT)
def test_where_peft_differs(tmp_path: Path, name: str, first: Any, second: Any, kind: str, message: str | None) -> None:
    ours = adapted(name, first, second)
    ours.save_pretrained(tmp_path)
    ours.add_weighted_adapter(["a", "b"], [50.0, 200.0], "mix", kind)
    ours.set_adapter("mix")
    theirs = peft.PeftModel.from_pretrained(MODELS[name].make(), tmp_path / "a", "a")
    if message is None:
        theirs.load_adapter(tmp_path / "b", "b")
        theirs.add_weighted_adapter(["a", "b"], [50.0, 200.0], "mix", kind)
        theirs.set_adapter("mix")
        assert deviation(says(theirs.eval(), name), says(ours, name)) > 1e-5
    else:
        with pytest.raises((ValueError, RuntimeError), match=message):
            theirs.load_adapter(tmp_path / "b", "b")
            theirs.add_weighted_adapter(["a", "b"], [50.0, 200.0], "mix", kind)
