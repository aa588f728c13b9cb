"""Norm tuning, (IA)^3 and adaption prompts against peft on every architecture that it has them for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs
import peft
import pytest
import torch

import veneer
from models import MODELS
from small import deviation

pytestmark = pytest.mark.filterwarnings("ignore")

NORMS = {
    "bert": ["LayerNorm"], "roberta": ["LayerNorm"], "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "whisper": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layer_norm"],
    "vit": ["layernorm_before", "layernorm_after"], "mixtral": ["input_layernorm", "norm"],
}  # fmt: skip
LN: list[Any] = [  # no targets: peft's defaults
    *[(name, {}) for name in ("llama", "llama_tied", "gpt2", "t5", "mt5", "bart")],
    *[(name, {"target_modules": found}) for name, found in NORMS.items()],
    ("llama", {"target_modules": r".*\.0\..*layernorm", "modules_to_save": ["lm_head"]}),
    ("bert", {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"}),
    # What else peft copies: a table, a head, a layer with a bias, one stored transposed, whole blocks.
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "norm"]}),
    ("gpt2", {"target_modules": ["c_fc", "ln_f", "wpe"]}),
    ("opt", {"target_modules": ["fc1"]}),
    ("llama", {"target_modules": ["layers.1.mlp"]}),
    ("qwen3_moe", {"target_modules": ["mlp"]}),
]


@pytest.mark.parametrize(("name", "options"), LN)
def test_norm_tuning(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pairs.exchange(MODELS[name].make, "LNTuningConfig", options, pairs.runner(name), tmp_path)


def test_norm_tuning_merges_as_in_peft(tmp_path: Path) -> None:
    run, base = pairs.runner("llama"), MODELS["llama"].make
    pairs.make(peft, base(), "LNTuningConfig", {}, tmp_path)
    plain = [pairs.load(library, base(), tmp_path).merge_and_unload() for library in (veneer, peft)]
    assert pairs.gap(*(pairs.output(m, run) for m in plain)) <= 1e-6
    a, b = (m.state_dict() for m in plain)
    assert a.keys() == b.keys() and all(deviation(a[k], b[k]) <= 1e-7 for k in a)


IA3: list[Any] = [  # no targets: peft's defaults
    *[(name, {}) for name in ("llama", "gpt2", "opt", "t5", "mt5", "bart", "bert", "roberta")],
    ("whisper", {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}),
    ("t5", {"target_modules": ["o", "wo", "v"], "feedforward_modules": ["o"]}),  # "o" means "wo" too
    ("bart", {"target_modules": r".*decoder.*(v_proj|fc1)", "feedforward_modules": r".*fc1"}),
    ("bert", {"target_modules": "all-linear", "feedforward_modules": [], "task_type": "SEQ_CLS"}),
    (
        "roberta",
        {
            "target_modules": ["dense"],
            "exclude_modules": ["pooler.dense"],
            "feedforward_modules": r".*\d\.output\.dense",
        },
    ),
    ("llama", {"init_ia3_weights": False, "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("name", "options"), IA3)
def test_ia3(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pairs.exchange(MODELS[name].make, "IA3Config", options, pairs.runner(name), tmp_path)


def test_peft_reads_what_the_default_feedforward_modules_come_to(tmp_path: Path) -> None:
    """peft writes its whole default beside other targets, and then refuses to read it."""
    base, run, options = MODELS["llama"].make, pairs.runner("llama"), {"target_modules": ["q_proj", "mlp.down_proj"]}
    pairs.make(peft, base(), "IA3Config", options, tmp_path / "peft")
    with pytest.raises(ValueError, match="subset"):
        pairs.load(peft, base(), tmp_path / "peft")
    pairs.load(veneer, base(), tmp_path / "peft")
    ours = pairs.make(veneer, base(), "IA3Config", options, tmp_path / "veneer")
    assert ours.peft_config["default"].feedforward_modules == {"mlp.down_proj"}
    pairs.compare(ours, pairs.load(peft, base(), tmp_path / "veneer"), run)


def two(name: str, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, Any]:
    """Veneer's and peft's model with the same adapters "default" and "b"."""
    base = MODELS[name].make
    theirs = pairs.make(peft, base(), "IA3Config", first, folder)
    torch.manual_seed(3)
    other = peft.get_peft_model(base(), peft.IA3Config(**second), adapter_name="b")
    pairs.shake(other, 0.7)
    other.save_pretrained(str(folder))
    theirs = pairs.load(peft, base(), folder)
    theirs.load_adapter(str(folder / "b"), "b", is_trainable=True)
    ours = pairs.load(veneer, base(), folder)
    ours.load_adapter(folder / "b", "b", is_trainable=True)
    return ours, theirs.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "bart", "bert", "roberta"])
def test_ia3_stacked_switched_and_weighted(name: str, tmp_path: Path) -> None:
    ours, theirs = two(name, tmp_path, {}, {})
    run, kept = pairs.runner(name), {}
    for chosen in ("b", "default", ["default", "b"]):
        ours.set_adapter(chosen)
        theirs.base_model.set_adapter(chosen)
        kept[str(chosen)] = pairs.output(ours, run)
        assert pairs.gap(kept[str(chosen)], pairs.output(theirs, run)) <= 1e-5
    run(ours)[1].backward()
    run(theirs)[1].backward()
    for adapter in ("default", "b"):
        mine = dict(veneer.files.adapter_files.named_tensors(ours, adapter))
        for key, value in theirs.named_parameters():
            if f".ia3_l.{adapter}" in key:
                assert pairs.gap(mine.pop(key.removesuffix(f".{adapter}")).grad, value.grad) <= 3e-5, key
        assert not mine
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "sum")
    assert ours.active_adapters == ["default", "b"], "adding an adapter must not activate it"
    ours.set_adapter("sum")
    theirs.set_adapter("sum")
    weighted = pairs.output(ours, run)
    assert pairs.gap(weighted, pairs.output(theirs, run)) <= 1e-5
    assert all(pairs.gap(weighted, other) > 1e-4 for other in kept.values())
    a, b = (m.get_peft_model_state_dict(x, adapter_name="sum") for m, x in ((veneer, ours), (peft, theirs)))
    assert a.keys() == b.keys() and all(deviation(a[k], b[k]) <= 1e-5 for k in a)
    assert not any(p.requires_grad for p in ours.runtime.parameters("sum"))
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["sum"])
    again = pairs.load(peft, MODELS[name].make(), tmp_path / "ours" / "sum")
    assert pairs.gap(pairs.output(again, run), weighted) <= 1e-5


def test_weighted_ia3_of_different_targets(tmp_path: Path) -> None:
    """Where one of the adapters is not, the other's vector counts alone, times its weight: as peft has it."""
    ours, theirs = two(
        "llama", tmp_path,
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    )  # fmt: skip
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "b"], [0.5, 2.0], "sum")
        model.set_adapter("sum")
    run = pairs.runner("llama")
    assert pairs.gap(pairs.output(ours, run), pairs.output(theirs, run)) <= 1e-5
    assert ours.peft_config["sum"].target_modules == theirs.peft_config["sum"].target_modules
    assert ours.peft_config["sum"].feedforward_modules == {"down_proj", "up_proj"}
