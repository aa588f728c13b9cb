"""AdapterHub's files: golden folders that `adapters` 1.3.0 wrote, read with equal outputs and written back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from adapterhub_models import FUSED, MODELS, logits
from small import deviation
from veneer.files import adapterhub
from write_adapterhub import base

GOLDEN = Path(__file__).parent / "golden_adapterhub"
WANTED = load_file(GOLDEN / "outputs.safetensors")
BROKEN = "t5_compacter"  # their library leaves the shared rule out of T5's files
SINGLE = [f"{n}_{label}" for n, row in MODELS.items() for label in row.configs if f"{n}_{label}" != BROKEN]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def same_files(theirs: Path, ours: Path, config: str) -> None:
    a, b = weights(theirs), weights(ours)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((ours / config).read_text()) == json.loads((theirs / config).read_text())


def fused(label: str) -> Any:
    name, parts, _ = FUSED[label]
    model = veneer.PeftModel.from_pretrained(base(name), GOLDEN / label / "part0", "part0")
    for i in range(1, len(parts)):
        model.load_adapter(GOLDEN / label / f"part{i}", f"part{i}")
    return model


@pytest.mark.parametrize("label", SINGLE)
def test_their_files_give_their_outputs_and_are_written_alike(label: str, tmp_path: Path) -> None:
    name = label.partition("_")[0]
    plain = logits(base(name), name)
    model = veneer.PeftModel.from_pretrained(base(name), GOLDEN / label)
    assert deviation(logits(model, name), WANTED[label]) <= 1e-5
    assert (WANTED[label] - plain).abs().max() > 1e-3
    adapterhub.save(model, tmp_path / "hub")
    again = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert again["name"] == "default"
    model = veneer.PeftModel.from_pretrained(base(name), GOLDEN / label, "gold")
    adapterhub.save(model, tmp_path / "gold", "gold", safetensors=False)
    same_files(GOLDEN / label, tmp_path / "gold", "adapter_config.json")
    # Veneer's own format keeps the outputs too.
    model.save_pretrained(tmp_path / "own")
    model = veneer.PeftModel.from_pretrained(base(name), tmp_path / "own" / "gold")
    assert deviation(logits(model, name), WANTED[label]) <= 1e-5


@pytest.mark.parametrize("label", FUSED)
def test_their_fusions(label: str, tmp_path: Path) -> None:
    name = FUSED[label][0]
    model = fused(label)
    model.load_adapter(GOLDEN / label / "fusion", "fusion")
    model.set_adapter("fusion")
    assert deviation(logits(model.eval(), name), WANTED[label]) <= 1e-5
    adapterhub.save(model, tmp_path / "fusion", "fusion")
    same_files(GOLDEN / label / "fusion", tmp_path / "fusion", "adapter_fusion_config.json")


def test_a_fusion_of_adapters_with_other_names() -> None:
    model = veneer.PeftModel.from_pretrained(base("bert"), GOLDEN / "bert_fused" / "part0", "a")
    model.load_adapter(GOLDEN / "bert_fused" / "part1", "b")
    with pytest.raises(ValueError, match="no adapter is named 'part0'"):
        model.load_adapter(GOLDEN / "bert_fused" / "fusion", "fusion")
    adapterhub.load(model, GOLDEN / "bert_fused" / "fusion", "fusion", adapter_names=["a", "b"])
    model.set_adapter("fusion")
    assert deviation(logits(model.eval(), "bert"), WANTED["bert_fused"]) <= 1e-5


def test_the_base_model_alone_reads_files_of_a_model_with_a_head() -> None:
    whole, bare = base("bert"), base("bert").bert
    ids = {"input_ids": torch.arange(3, 9)[None]}
    model = veneer.PeftModel.from_pretrained(whole, GOLDEN / "bert_double_seq_bn")
    other = veneer.PeftModel.from_pretrained(bare, GOLDEN / "bert_double_seq_bn")
    with torch.no_grad():
        assert torch.equal(model.get_base_model().bert(**ids)[0], other(**ids)[0])


def test_refusals(tmp_path: Path) -> None:
    def folder(**changes: Any) -> Path:
        values = json.loads((GOLDEN / "bert_seq_bn" / "adapter_config.json").read_text())
        values["config"] |= changes
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        return tmp_path

    with pytest.raises(ValueError, match="inv_adapter='nice' is not supported"):
        veneer.PeftModel.from_pretrained(base("bert"), folder(inv_adapter="nice"))
    with pytest.raises(ValueError, match="config of 'lora'"):
        veneer.PeftModel.from_pretrained(base("bert"), folder(architecture="lora"))
    with pytest.raises(ValueError, match="magic=3 is not known"):
        veneer.PeftModel.from_pretrained(base("bert"), folder(magic=3))
    with pytest.raises(ValueError, match=r"holds neither adapter\.safetensors nor"):
        veneer.PeftModel.from_pretrained(base("bert"), folder())
    with pytest.raises(ValueError, match="made for model type 'bert'"):
        veneer.PeftModel.from_pretrained(base("gpt2"), GOLDEN / "bert_seq_bn")
    with pytest.raises(veneer.AdapterLoadError, match=r"missing from the file: base_model\.phm_rule"):
        veneer.PeftModel.from_pretrained(base("t5"), GOLDEN / BROKEN)
    model = veneer.get_peft_model(base("bert"), veneer.BottleneckConfig(target_modules=["pooler"]))
    with pytest.raises(ValueError, match="knows blocks only"):
        adapterhub.save(model, tmp_path / "no")
    model = veneer.get_peft_model(base("bert"), veneer.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="bottleneck adapters only"):
        adapterhub.save(model, tmp_path / "no")
