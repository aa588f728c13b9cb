"""When Liger's loss is used and when it is refused. Liger itself runs on GPUs only."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

# Now, as what it imports would ask for the CUDA that these tests feign.
from transformers.models.llama import modeling_llama  # noqa: F401

import veneer
from veneer.interop import liger

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, model=None): ...


@pytest.fixture
def installed(monkeypatch):
    """A GPU, and Liger with the one function that is asked of it."""
    known = {"llama": apply_to_llama, "vision": lambda model=None: None}
    package = types.ModuleType("liger_kernel")
    package.__spec__ = types.SimpleNamespace()
    patching = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = known
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    for name, module in zip(names, (package, types.ModuleType(names[1]), patching), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def adapted(**config):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    veneer.get_peft_model(base, veneer.LoraConfig(**config))
    return base


def test_only_the_loss_is_fused(installed):
    assert liger.loss_only(adapted(target_modules="all-linear")) == {
        "rope": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": True,
        "rms_norm": False,
    }


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapted_head_is_refused(installed, config):
    with pytest.raises(ValueError, match="adapter changes the output head"):
        liger.loss_only(adapted(**config))


def test_an_adapter_with_its_own_loss_is_refused(installed):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    ids = list(range(4))
    config = veneer.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=ids, cpt_mask=[1] * 4, cpt_tokens_type_mask=[1] * 4)
    veneer.get_peft_model(base, config)
    with pytest.raises(ValueError, match="adapter changes the loss"):
        liger.loss_only(base)


def test_other_architectures_are_refused(installed):
    base = adapted(target_modules="all-linear")
    for kind in ("vision", "unheard-of"):
        base.config.model_type = kind
        with pytest.raises(ValueError, match=f"no fused cross-entropy for model type '{kind}'"):
            liger.loss_only(base)


def test_no_gpu(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="runs on a GPU"):
        liger.loss_only(adapted(target_modules="all-linear"))


def test_not_installed(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        liger.loss_only(adapted(target_modules="all-linear"))


def test_the_command_line_says_so(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from veneer.cli.app import app

    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    import veneer.recipes.train as training

    task = training.TASKS["causal-lm"]
    monkeypatch.setattr(task, "load_model", lambda *a, **k: base, raising=False)
    monkeypatch.setattr(task, "processor", lambda run: types.SimpleNamespace(pad_token_id=0), raising=False)
    monkeypatch.setattr(
        training.rows_of, "load_data", lambda run: types.SimpleNamespace(labels=[], train=[], held_out=[])
    )
    monkeypatch.setattr(task, "encode", lambda *a: [], raising=False)
    command = [
        "train",
        "--model",
        "m",
        "--data",
        "d",
        "--target-modules",
        "all-linear",
        "--liger",
        "--out",
        str(tmp_path / "x"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and "pip install liger-kernel" in done.output
