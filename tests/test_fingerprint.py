"""Base fingerprints: what is the same base in another form, and what is another."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig

import veneer
import words
from models import MODELS
from small import deviation, llama, lora
from veneer.cli.app import app
from veneer.io import fingerprint, locate
from veneer.io.fingerprint import BaseMismatchWarning, Fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def quiet(base: Any, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        return veneer.PeftModel.from_pretrained(base, folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same(saved: Path, dtype: torch.dtype) -> None:
    quiet(llama(dtype=dtype), saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_a_half_base_knows_the_float_base(dtype: torch.dtype, tmp_path: Path) -> None:
    lora(llama(dtype=dtype)).save_pretrained(tmp_path)
    quiet(llama(dtype=dtype).float(), tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "vit", "whisper", "mixtral"])
def test_every_architecture_knows_itself_and_another_start(name: str, tmp_path: Path) -> None:
    make = MODELS[name].make
    base = make()
    lora(base).save_pretrained(tmp_path)
    quiet(make(), tmp_path)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    with pytest.warns(BaseMismatchWarning, match="sampled tensors hold other values"):
        veneer.PeftModel.from_pretrained(other, tmp_path)


def test_another_checkpoint_of_the_same_shape_is_said(saved: Path) -> None:
    base = llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.warns(BaseMismatchWarning, match="1 of 21 sampled tensors hold other values.*layers.1.mlp.up_proj"):
        model = veneer.PeftModel.from_pretrained(base, saved)
    assert torch.equal(
        model.get_base_model().model.layers[1].mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight
    )


def test_another_depth_is_refused_where_the_file_would_fit(tmp_path: Path) -> None:
    config = veneer.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3
    )  # nothing in its file tells the depth
    veneer.get_peft_model(llama(2), config).save_pretrained(tmp_path)
    base = llama(3)
    with pytest.raises(veneer.AdapterLoadError, match="layers was 2 and is 3 here"):
        veneer.PeftModel.from_pretrained(base, tmp_path)
    with pytest.warns(BaseMismatchWarning, match="layers was 2"):
        veneer.PeftModel.from_pretrained(base, tmp_path, strict=False)


def test_a_refused_base_is_as_it_was(tmp_path: Path, saved: Path) -> None:
    base = llama(3)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(veneer.AdapterLoadError):
        veneer.PeftModel.from_pretrained(base, saved)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_a_resized_vocabulary_is_no_other_architecture(saved: Path) -> None:
    base = llama()
    base.resize_token_embeddings(70, mean_resizing=False)
    with pytest.warns(BaseMismatchWarning, match="vocabulary was 64 and is 70 here"):
        veneer.PeftModel.from_pretrained(base, saved)


def test_the_fingerprint_is_of_the_base_before_merging_and_starts(tmp_path: Path) -> None:
    model = lora()
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    quiet(llama(), tmp_path / "merged")
    veneer.get_peft_model(
        llama(), veneer.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "pissa")
    quiet(llama(), tmp_path / "pissa")


def test_a_model_without_its_head_is_the_same_base(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "a")
    then = fingerprint.read_fingerprint(tmp_path / "a" / locate.WEIGHTS_NAME)
    assert then is not None
    found = fingerprint.compare_base(then, AutoModel.from_pretrained(tmp_path / "base"))
    assert found.compared == len(then.weights) - 1 and not found.describe()  # but for the head


def test_files_without_one_load_as_before(saved: Path) -> None:
    path = saved / locate.WEIGHTS_NAME
    save_file(load_file(path), path, metadata={"format": "pt"})
    quiet(llama(), saved)


def test_peft_reads_the_file(saved: Path) -> None:
    import peft

    model = peft.PeftModel.from_pretrained(llama(), saved)
    ids = torch.arange(6)[None]  # (1, 6)
    assert deviation(model(ids).logits, quiet(llama(), saved)(ids).logits) <= 1e-5


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 1}', '{"format": 1, "weights": {"a": [[2], "!"]}, "sizes": {}, "architecture": "x"}',
     '{"format": 1, "weights": 3, "sizes": {}, "architecture": "x"}', "[" * 100_000, " " * 2_000_000],
)  # fmt: skip
def test_what_is_no_fingerprint_is_refused(saved: Path, text: str) -> None:
    path = saved / locate.WEIGHTS_NAME
    save_file(load_file(path), path, metadata={"format": "pt", fingerprint.KEY: text})
    with pytest.raises(ValueError, match="no fingerprint of a base model"):
        veneer.PeftModel.from_pretrained(llama(), saved)


def test_a_later_format_is_passed_over(saved: Path) -> None:
    path = saved / locate.WEIGHTS_NAME
    save_file(load_file(path), path, metadata={"format": "pt", fingerprint.KEY: json.dumps({"format": 99})})
    quiet(llama(), saved)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_rounding_is_no_difference_and_a_change_is_one(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    module = torch.nn.Linear(columns, rows, bias=False)
    module.weight.data = weight
    then = Fingerprint.from_json(fingerprint.fingerprint_of(module).to_json())
    assert then == fingerprint.fingerprint_of(module)
    for dtype in (torch.float16, torch.bfloat16):
        module.weight.data = weight.to(dtype)
        assert not fingerprint.compare_base(then, module).describe()
    module.weight.data = weight * 1.05
    assert fingerprint.compare_base(then, module).weights


def test_another_tokenizer_is_said() -> None:
    class Tokenizer:
        special_tokens_map = {"eos_token": "</s>"}

        def __init__(self, words: list[str]) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {w: i for i, w in enumerate(self.words)}

    base = llama()
    then = fingerprint.fingerprint_of(base, Tokenizer(["a", "b"]))
    assert not fingerprint.compare_base(then, base, Tokenizer(["a", "b"])).describe()
    assert "tokenizer has another vocabulary" in fingerprint.compare_base(then, base, Tokenizer(["b", "a"])).describe()


def test_training_notes_the_tokenizer_and_generation_looks_at_it(tmp_path: Path) -> None:
    words.write_models(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in words.PAIRS))
    command = ["train", "--model", str(tmp_path / "causal"), "--data", str(tmp_path / "pairs.jsonl"), "--steps", "2",
               "--save-every", "0", "--out", str(tmp_path / "run")]  # fmt: skip
    assert CliRunner().invoke(app, command).exit_code == 0
    then = fingerprint.read_fingerprint(tmp_path / "run" / locate.WEIGHTS_NAME)
    assert then is not None and then.tokenizer
    use = ["generate", str(tmp_path / "causal"), "--adapter", str(tmp_path / "run"), "-p", "say red 1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        assert CliRunner().invoke(app, use).exit_code == 0
    path = tmp_path / "causal" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] = {
        k: v for (k, _), v in zip(reversed(values["model"]["vocab"].items()), values["model"]["vocab"].values())
    }
    path.write_text(json.dumps(values))
    with pytest.warns(BaseMismatchWarning, match="its ids mean other words"):
        CliRunner().invoke(app, use)


def test_metadata_stays_small(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=80, num_attention_heads=4, vocab_size=64
    )
    lora(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    with safe_open(tmp_path / locate.WEIGHTS_NAME, "pt") as file:
        assert len(file.metadata()[fingerprint.KEY]) < 6_000


def test_a_new_head_is_the_adapters_own(tmp_path: Path) -> None:
    """Its values in the base are drawn anew each time, and say nothing of which base it is."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    base = BertForSequenceClassification(config)
    model = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    then = fingerprint.read_fingerprint(tmp_path / "adapter_model.safetensors")
    assert then is not None and "classifier.weight" not in then.weights
    torch.nn.init.normal_(base.classifier.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.PeftModel.from_pretrained(base, tmp_path)


def test_force_loads_onto_another_size(tmp_path: Path) -> None:
    words.write_models(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "causal")
    config = copy.deepcopy(made.config)
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deeper")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "deeper" / name).write_bytes((tmp_path / "causal" / name).read_bytes())
    config = veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    veneer.get_peft_model(made, config).save_pretrained(tmp_path / "prompt")
    use = ["generate", str(tmp_path / "deeper"), "--adapter", str(tmp_path / "prompt"), "-p", "say red 1"]
    refused = CliRunner().invoke(app, use)
    assert refused.exit_code == 2 and "layers was 1 and is 2 here" in " ".join(refused.output.split())
    with pytest.warns(BaseMismatchWarning, match="layers was 1 and is 2 here"):
        assert CliRunner().invoke(app, [*use, "--force"]).exit_code == 0
