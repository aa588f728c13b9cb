"""Configs in both directions, fields of other versions, adapters with names, and the older `.bin`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pairs
import peft
import pytest
import torch
from safetensors.torch import load_file

import veneer
from models import IDS, MODELS

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = MODELS["llama"].make
CONFIGS: dict[str, dict[str, Any]] = {  # every field at another value than its default
    "LoraConfig": {
        "r": 4, "lora_alpha": 3, "target_modules": ["q_proj"], "lora_dropout": 0.1, "rank_pattern": {"a": 2},
        "alpha_pattern": {"b": 1}, "layers_to_transform": [1], "layers_pattern": "x", "exclude_modules": ["z"],
        "use_rslora": True, "modules_to_save": ["h"], "bias": "all", "task_type": "CAUSAL_LM", "use_dora": True,
        "trainable_token_indices": {"e": [1]}, "init_lora_weights": "gaussian", "target_parameters": ["p"],
        "fan_in_fan_out": True, "inference_mode": True, "revision": "v2", "base_model_name_or_path": "me/base",
    },
    "IA3Config": {"target_modules": ["k", "v"], "feedforward_modules": ["k"], "init_ia3_weights": False,
                  "fan_in_fan_out": True, "exclude_modules": "x", "modules_to_save": ["h"]},
    "LoHaConfig": {"r": 3, "alpha": 2, "rank_dropout": 0.1, "module_dropout": 0.2, "use_effective_conv2d": True,
                   "target_modules": ".*q", "init_weights": False, "rank_pattern": {"a": 2}, "alpha_pattern": {"a": 3}},
    "OFTConfig": {"oft_block_size": 0, "r": 4, "coft": True, "eps": 1e-3, "block_share": True, "module_dropout": 0.1,
                  "use_cayley_neumann": False, "num_cayley_neumann_terms": 7, "bias": "oft_only",
                  "init_weights": False},
    "VeraConfig": {"r": 9, "projection_prng_key": 4, "save_projection": False, "vera_dropout": 0.1, "d_initial": 0.3,
                   "bias": "vera_only", "init_weights": False},
    "LNTuningConfig": {"target_modules": ["norm"], "exclude_modules": "x", "modules_to_save": ["h"]},
    "AdaptionPromptConfig": {"target_modules": "attn", "adapter_len": 4, "adapter_layers": 2},
    "TrainableTokensConfig": {"token_indices": [2, 1], "target_modules": ["e"], "init_weights": False},
}  # fmt: skip


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def plain(value: Any) -> Any:
    """Sets are written in any order by peft."""
    return sorted(value) if isinstance(value, (set, list)) else value


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["default", "set"])
def test_configs_in_both_directions(name: str, kind: str, tmp_path: Path) -> None:
    options = CONFIGS[name] if kind == "set" else {}
    theirs, ours = (getattr(library, name)(**options) for library in (peft, veneer))
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours.save_pretrained(str(tmp_path / "veneer"))
    files = [json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("peft", "veneer")]
    assert {k: v for k, v in files[1].items() if plain(files[0][k]) != plain(v)} == {}
    assert files[0].keys() - files[1].keys() <= type(ours).foreign.keys()
    back = peft.PeftConfig.from_pretrained(str(tmp_path / "veneer"))
    assert {k for k, v in vars(theirs).items() if plain(getattr(back, k)) != plain(v)} == set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that peft writes today is unknown
        again = veneer.PeftConfig.from_pretrained(tmp_path / "peft")
    assert {k for k, v in vars(ours).items() if plain(getattr(again, k)) != plain(v)} <= {"peft_version", "from_file"}


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_field_that_is_not_in_use_is_named_once(value: Any, tmp_path: Path) -> None:
    pairs.make(peft, LLAMA(), "LoraConfig", {"r": 4}, tmp_path)
    rewrite(tmp_path, zeta=value, eta=value)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        veneer.PeftModel.from_pretrained(LLAMA(), tmp_path)
    assert [all(field in str(w.message) for field in ("zeta", "eta")) for w in seen] == [True]


@pytest.mark.parametrize("fields", [
    {"zeta": 1}, {"zeta": "x"}, {"zeta": True}, {"zeta": [0]}, {"layer_replication": [[0, 1]]},
    {"loftq_config": {"loftq_bits": 4}}, {"ensure_weight_tying": True}, {"alora_invocation_tokens": [1]},
])  # fmt: skip
def test_a_field_that_would_change_the_result_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    pairs.make(peft, LLAMA(), "LoraConfig", {"r": 4}, tmp_path)
    rewrite(tmp_path, **fields)
    base = LLAMA()
    with pytest.raises(ValueError, match=next(iter(fields))):
        veneer.PeftModel.from_pretrained(base, tmp_path)
    assert type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear, "the base model was changed"


def test_a_config_of_an_early_peft(tmp_path: Path) -> None:
    model = pairs.make(peft, LLAMA(), "LoraConfig", {"r": 4, "target_modules": ["q_proj"]}, tmp_path)
    early = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": None}
    early |= {"inference_mode": True, "bias": "none", "enable_lora": None, "merge_weights": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(early))
    run = pairs.runner("llama")
    assert pairs.gap(pairs.output(pairs.load(veneer, LLAMA(), tmp_path), run), pairs.output(model, run)) <= 1e-5


def test_bin_files_of_peft(tmp_path: Path) -> None:
    base, run = LLAMA(), pairs.runner("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, trainable_token_indices=[3], modules_to_save=["norm"]))
    pairs.shake(model)
    model.eval().save_pretrained(str(tmp_path), safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    ours = veneer.PeftModel.from_pretrained(LLAMA(), tmp_path)
    assert pairs.gap(pairs.output(ours, run), pairs.output(model, run)) <= 1e-5


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_files_in_half_precision(name: str, tmp_path: Path) -> None:
    """The dtype in the file is not the dtype of the adapter: values are read, float32 is trained."""
    pairs.make(peft, LLAMA(), "LoraConfig", {"r": 4, "use_dora": True}, tmp_path)
    path, run = tmp_path / "adapter_model.safetensors", pairs.runner("llama")
    veneer.files.adapter_files.save_weights(
        {k: v.to(getattr(torch, name)) for k, v in load_file(path).items()}, tmp_path
    )
    ours, theirs = (pairs.load(library, LLAMA(), tmp_path) for library in (veneer, peft))
    pairs.compare(ours, theirs, run)
    assert {p.dtype for _, p in veneer.files.adapter_files.named_tensors(ours)} == {torch.float32}


@pytest.mark.parametrize(("config", "options"), [
    ("LoraConfig", {"r": 4}), ("VeraConfig", {"r": 4}), ("OFTConfig", {"oft_block_size": 8}),
])  # fmt: skip
def test_a_head_and_every_bias_come_back_from_veneers_own_file(
    config: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, run = MODELS["bert"].make, pairs.runner("bert")
    ours = pairs.make(veneer, base(), config, {"task_type": "SEQ_CLS", "bias": "all", **options}, tmp_path)
    again = pairs.load(veneer, base(), tmp_path)
    assert pairs.gap(pairs.output(again, run), pairs.output(ours, run)) <= 1e-6


@pytest.mark.parametrize(("writer", "reader"), [(peft, veneer), (veneer, peft)], ids=["peft-veneer", "veneer-peft"])
def test_adapters_with_names(writer: Any, reader: Any, tmp_path: Path) -> None:
    run = pairs.runner("llama")
    model = writer.get_peft_model(LLAMA(), writer.LoraConfig(r=4), adapter_name="mine")
    model.add_adapter("two", writer.LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]))
    pairs.shake(model)
    model.eval().save_pretrained(str(tmp_path))
    for name in ("mine", "two"):
        model.set_adapter(name)
        for where in ({"model_id": str(tmp_path / name)}, {"model_id": str(tmp_path), "subfolder": name}):
            other = reader.PeftModel.from_pretrained(LLAMA(), adapter_name="other", **where).eval()
            assert pairs.gap(pairs.output(other, run), pairs.output(model, run)) <= 1e-5


@pytest.mark.parametrize("options", [
    {}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]},
    {"target_modules": ["embed_tokens", "q_proj"]},
])  # fmt: skip
def test_state_dicts_cross_over_in_memory(options: dict[str, Any]) -> None:
    run = pairs.runner("llama")
    ours, theirs = (m.get_peft_model(LLAMA(), m.LoraConfig(r=4, **options)).eval() for m in (veneer, peft))
    pairs.shake(theirs)
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert veneer.get_peft_model_state_dict(ours).keys() == state.keys()
    veneer.set_peft_model_state_dict(ours, state)
    assert pairs.gap(pairs.output(ours, run), pairs.output(theirs, run)) <= 1e-5
    pairs.shake(ours)
    result = peft.set_peft_model_state_dict(theirs, veneer.get_peft_model_state_dict(ours))
    assert not result.unexpected_keys
    assert pairs.gap(pairs.output(theirs, run), pairs.output(ours, run)) <= 1e-5


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_generation(name: str, task: str, tmp_path: Path) -> None:
    pairs.make(peft, MODELS[name].make(), "LoraConfig", {"r": 4, "task_type": task}, tmp_path)
    models = [pairs.load(library, MODELS[name].make(), tmp_path) for library in (peft, veneer)]
    said = [model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False) for model in models]
    assert torch.equal(*said)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gradients_through_checkpoints(name: str, tmp_path: Path) -> None:
    pairs.make(peft, MODELS[name].make(), "LoraConfig", {"r": 4}, tmp_path)

    def load(library: Any) -> Any:
        base: Any = MODELS[name].make()
        base.gradient_checkpointing_enable()
        return library.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).train()

    pairs.compare(load(veneer), load(peft), pairs.runner(name))
