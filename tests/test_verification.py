"""Certificates: what `verify` finds, what a wrong merge or a changed file does to it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import veneer
from models import MODELS
from small import llama, lora, scramble
from veneer.checks import verify
from veneer.cli.app import app
from veneer.files import adapter_files, certificate
from veneer.files.certificate import NAME, Certificate, CertificateWarning
from veneer.io import locate
from veneer.lifecycle import merge
from words import write_models

CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, Any] = {
    "lora": veneer.LoraConfig(r=4, target_modules="all-linear"),
    "dora": veneer.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "loha": veneer.LoHaConfig(r=4, target_modules="all-linear"),
    "ia3": veneer.IA3Config(target_modules="all-linear", feedforward_modules=[]),
    "oft": veneer.OFTConfig(oft_block_size=8, target_modules="all-linear"),
    "vera": veneer.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "query", "value", "q", "v"]),
    "norms": veneer.LNTuningConfig(),
    "bottleneck": veneer.BottleneckConfig(),
    "prompt": veneer.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "prefix": veneer.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "p-tuning": veneer.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **CAUSAL),
    "multitask prompt": veneer.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, num_ranks=2, **CAUSAL),
    "cpt": veneer.CPTConfig(cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 2], **CAUSAL),
    "llama-adapter": veneer.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **CAUSAL),
    "tokens": veneer.TrainableTokensConfig(token_indices=[1, 5], **CAUSAL),
    "biases": veneer.BitFitConfig(),
    "rslora and bias": veneer.LoraConfig(r=4, use_rslora=True, bias="all", target_modules="all-linear"),
    "whole copies": veneer.LoraConfig(r=4, target_modules=["q_proj", "query", "q"]),
}
COPIES = {"llama": ["norm", "v_proj"], "bert": ["LayerNorm"], "t5": ["final_layer_norm", "wo"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
UNFIT = {
    "vera": ("bert", "t5"),
    "bottleneck": ("t5",),
    "cpt": ("bert", "t5"),
    "llama-adapter": ("bert", "t5"),
    "biases": ("llama", "t5"),
}
FITS = [(n, m) for n in METHODS for m in TASKS if m not in UNFIT.get(n, ())]


def adapted(name: str, architecture: str = "llama") -> Any:
    config = METHODS[name].replace(task_type=TASKS[architecture])
    if name == "whole copies":
        config = config.replace(modules_to_save=COPIES[architecture])
    model = veneer.get_peft_model(MODELS[architecture].make(), config)
    scramble(model)
    return model


@pytest.mark.parametrize(("name", "architecture"), FITS)
def test_merging_and_unmerging_every_method(name: str, architecture: str) -> None:
    model = adapted(name, architecture)
    inputs = verify.example_inputs(model.get_base_model())
    if name == "multitask prompt":
        inputs["task_ids"] = torch.tensor([0, 1])
    said = verify.model_outputs(model, inputs)
    checks = verify.check_merging(model, "default", inputs, said)
    assert all(c.passed is not False for c in checks), checks
    if name in ("prompt", "prefix", "p-tuning", "bottleneck", "multitask prompt", "cpt", "llama-adapter"):
        assert checks[0].passed is None and "cannot be merged" in checks[0].note
    else:
        assert [c.passed for c in checks] == [True, True]


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3", "oft", "vera"])
def test_a_wrong_merge_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    inputs = verify.example_inputs(model.get_base_model())
    said = verify.model_outputs(model, inputs)
    right = merge.merge_site

    def wrong(site: Any, *args: Any) -> None:
        right(site, *args)
        if site.name.endswith("layers.1.self_attn.q_proj"):
            site.owner.weight.data *= 1.01

    monkeypatch.setattr(merge, "merge_site", wrong)
    merged, bits = verify.check_merging(model, "default", inputs, said)
    assert merged.passed is False and merged.difference is not None and merged.difference > 1e-5
    assert bits.passed is True


def test_bits_that_do_not_come_back_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("lora")
    inputs = verify.example_inputs(model.get_base_model())
    monkeypatch.setattr(merge, "restore_weight", lambda site: setattr(site, "original", None))
    merged, bits = verify.check_merging(model, "default", inputs, verify.model_outputs(model, inputs))
    assert merged.passed is True and bits.passed is False and "tensors changed" in bits.note


def test_a_certificate_of_a_lora(tmp_path: Path) -> None:
    found = veneer.verify(lora(), tmp_path)
    assert found.passed and found.effect > 0.01
    assert [c.passed for c in found.checks] == [True] * 6, found.checks
    assert Certificate.load(tmp_path) == found
    with warnings.catch_warnings():
        warnings.simplefilter("error", CertificateWarning)
        veneer.PeftModel.from_pretrained(llama(), tmp_path)
    said = CliRunner().invoke(app, ["inspect", str(tmp_path)]).output
    assert "verified" in said and "passed" in said and found.base in said

    state = locate.read_tensors(tmp_path / locate.WEIGHTS_NAME)
    key = min(k for k in state if "lora_B" in k)
    adapter_files.save_weights({**state, key: state[key] + 1e-3}, tmp_path)
    with pytest.warns(CertificateWarning, match="was changed after it was verified"):
        veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert "of other files" in CliRunner().invoke(app, ["inspect", str(tmp_path)]).output

    dataclasses.replace(found, files={}, checks=(certificate.Check("merged", False),)).save(tmp_path)
    with pytest.warns(CertificateWarning, match="says that the adapter failed: merged"):
        veneer.PeftModel.from_pretrained(llama(), tmp_path)


def test_a_base_that_moved_is_seen() -> None:
    model = lora()
    assert verify.check_untouched(model).passed
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(1.1)
    found = verify.check_untouched(model)
    assert found.passed is False and "embed_tokens.weight" in found.note


@pytest.mark.slow
def test_a_base_that_moved_is_caught(tmp_path: Path) -> None:
    """What trains the base along with the adapter makes an adapter that means nothing elsewhere."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = lora(type(base).from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(1.1)
    found = veneer.verify(model)
    failed = {c.name for c in found.checks if c.passed is False}
    assert {"base untouched since attaching", "loaded in a new process"} <= failed and not found.passed


def test_the_command(tmp_path: Path) -> None:
    write_models(tmp_path)
    model = veneer.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "causal"),
        veneer.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    )
    scramble(model)
    model.save_pretrained(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert "not applicable" in result.output and NAME in result.output
    after = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert {k: v for k, v in after.items() if k != NAME} == before  # what lies there is what was looked at
    assert json.loads(after[NAME])["passed"] is True
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "a"), "--model", str(tmp_path / "opt")])
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "[" * 100_000, '{"format": 1, "checks": 3}'])
def test_what_is_no_certificate(tmp_path: Path, text: str) -> None:
    lora().save_pretrained(tmp_path)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match="is no certificate"):
        veneer.PeftModel.from_pretrained(llama(), tmp_path)


def test_inputs_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"give inputs=\{"):
        verify.example_inputs(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), FITS)
def test_every_method_in_new_processes(name: str, architecture: str, tmp_path: Path) -> None:
    found = veneer.verify(adapted(name, architecture), tmp_path)
    assert found.passed, verify.table_rows(found)
    assert found.checks[1].passed is True
