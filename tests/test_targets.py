"""Which modules a config adapts."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import peft.utils.constants as known
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen2MoeConfig

from models import MODELS
from small import llama
from veneer import layers, targets

NAMES = st.lists(st.sampled_from(["layers", "0", "1", "q_proj", "proj", "self_attn", "mlp"]), min_size=1, max_size=5)


def config(**options: Any) -> Any:
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "modules_to_save")
    return SimpleNamespace(**dict.fromkeys(fields) | {"target_modules": None, "peft_type": "LORA"} | options)


def resolve(model: nn.Module, **options: Any) -> list[str]:
    return targets.resolve(model, config(**options), supported=layers.supported).modules


@given(NAMES.map(".".join), st.lists(NAMES.map(lambda n: ".".join(n[:2])), min_size=1, max_size=3))
def test_suffixes_match_as_in_peft(key: str, spec: list[str]) -> None:
    theirs = check_target_module_exists(config(target_modules=set(spec)), key)
    assert targets.matches(key, set(spec)) == bool(theirs)


@given(NAMES.map(".".join), st.sampled_from([r".*proj", r"layers\.\d\..*", r".*\.(q_proj|mlp)", "mlp"]))
def test_expressions_match_as_in_peft(key: str, spec: str) -> None:
    assert targets.matches(key, spec) == bool(re.fullmatch(spec, key))


def test_defaults_are_pefts_and_more() -> None:
    pattern = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING")
    methods = {m.group(1).lower(): getattr(known, n) for n in dir(known) if (m := pattern.fullmatch(n))}
    assert len(methods) > 30
    for method, table in methods.items():
        for architecture, modules in table.items():
            assert targets.default_targets({"lntuning": "ln_tuning"}.get(method, method), architecture) == modules
    for architecture, modules in known.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items():
        assert targets.default_feedforward(architecture) == modules


OWN = sorted(set(targets.defaults()["lora"]) - set(known.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING))


@pytest.mark.parametrize("architecture", OWN)
def test_defaults_that_peft_lacks_name_real_modules(architecture: str) -> None:
    made = AutoConfig.for_model(architecture)
    with torch.device("meta"):
        model = AutoModel.from_config(made)
    assert resolve(model)
    if targets.default_targets("IA3", architecture):
        names = [n for n, _ in model.named_modules()]
        for entry in targets.default_targets("IA3", architecture):
            assert any(targets.matches(n, {entry}) for n in names), entry


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mt5", "bert", "opt", "whisper", "vit"])
def test_all_linear_is_pefts(name: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    model = MODELS[name].make()
    theirs = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model).target_modules
    assert set(resolve(model, target_modules="all-linear")) == set(theirs)


def test_all_linear_leaves_out_heads_and_routers() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(num_hidden_layers=1))
    found = resolve(model, target_modules="all-linear")
    assert "lm_head" not in found
    assert not [n for n in found if n.endswith(("shared_expert_gate", ".gate"))]
    assert any(n.endswith("shared_expert.gate_proj") for n in found)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.router = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2))
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    assert resolve(nn.Sequential(Block()), target_modules="all-linear") == ["0.experts.0"]


def test_layers() -> None:
    model = llama(3)
    spec = {"target_modules": ["q_proj"]}
    assert resolve(model, **spec, layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
    assert len(resolve(model, **spec, layers_to_transform=[0, 2], layers_pattern="layers")) == 2
    with pytest.raises(ValueError, match=r"no layer \[7\].*0 to 2"):
        resolve(model, **spec, layers_to_transform=[1, 7])
    with pytest.raises(ValueError, match="needs layers_to_transform"):
        resolve(model, **spec, layers_pattern="layers")
    with pytest.raises(ValueError, match="regular expression"):
        resolve(model, target_modules=".*q_proj", layers_to_transform=1)


def test_exclusion() -> None:
    model = llama()
    assert len(resolve(model, target_modules=["q_proj"], exclude_modules=r".*\.0\..*")) == 1
    with pytest.raises(ValueError, match="exclude_modules removes all"):
        resolve(model, target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.warns(UserWarning, match="excludes nothing"):
        resolve(model, target_modules=["q_proj"], exclude_modules=["k_proj"])


def test_what_is_said() -> None:
    model = llama()
    with pytest.warns(UserWarning, match="no module is named 'v_prj'; did you mean 'v_proj'"):
        resolve(model, target_modules=["q_proj", "v_prj"])
    with pytest.raises(ValueError, match="a LlamaMLP, which cannot be adapted"):
        resolve(model, target_modules=["mlp"])
    with pytest.raises(ValueError, match="no default for model type None"):
        resolve(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="name at least one module"):
        resolve(model, target_modules=[])
    with pytest.raises(ValueError, match="no parameter is named 'experts.gate'"):
        resolve(MODELS["mixtral"].make(), target_parameters=["experts.gate"])


def test_resolving_many_layers_does_not_depend_on_adapters_present() -> None:
    """Cost grows with the modules of the base model only: no absolute time is asserted."""
    import veneer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=20))

    def cost() -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            resolve(model, target_modules="all-linear")
            best = min(best, time.perf_counter() - start)
        return best

    before = cost()
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    for i in range(10):
        adapted.add_adapter(f"a{i}", veneer.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    assert cost() < 3 * before
