"""Files: golden ones that peft wrote, names, folders, the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from models import MODELS
from small import IDS, deviation, llama, lora
from veneer.files import adapter_files

GOLDEN = Path(__file__).parent / "golden"
AUTO = {
    "CAUSAL_LM": ("llama", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("t5", "AutoPeftModelForSeq2SeqLM"),
    "SEQ_CLS": ("bert", "AutoPeftModelForSequenceClassification"),
}


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()))
def test_files_that_peft_wrote(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")["logits"]
    model = veneer.PeftModel.from_pretrained(llama(1), GOLDEN / name)
    assert deviation(model(IDS).logits, expected) <= 1e-5
    assert deviation(llama(1)(IDS).logits, expected) > 2e-5


def test_several_adapters_go_into_folders_of_their_names(tmp_path: Path) -> None:
    model = lora()
    model.add_adapter("b", veneer.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "adapters.json", "b",
    ]  # fmt: skip
    assert veneer.PeftConfig.from_pretrained(tmp_path, subfolder="b").peft_type == "IA3"
    other = veneer.PeftModel.from_pretrained(llama(), tmp_path, subfolder="b", adapter_name="mine")
    assert other.active_adapters == ["mine"] and other.peft_config["mine"].inference_mode
    only = tmp_path / "only"
    model.save_pretrained(only, selected_adapters=["b"])
    assert sorted(p.name for p in only.iterdir()) == ["b"]


def test_saving_twice_keeps_what_is_beside(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other.txt").write_text("mine too")
    lora().save_pretrained(tmp_path)
    lora(seed=2).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "other.txt").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("task", AUTO)
def test_auto_classes_find_base_and_adapter(task: str, tmp_path: Path) -> None:
    name, cls = AUTO[task]
    base = MODELS[name].make()
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    model = veneer.get_peft_model(loaded, veneer.LoraConfig(task_type=task, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["inference_mode"]
    expected = model(**MODELS[name].inputs()).logits
    for auto in (getattr(veneer, cls), veneer.AutoPeftModel):
        again = auto.from_pretrained(tmp_path / "adapter", attn_implementation="eager").eval()
        assert deviation(again(**MODELS[name].inputs()).logits, expected) <= 1e-5


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None])
def test_the_other_tasks(task: str | None, tmp_path: Path) -> None:
    import transformers as t

    classes = {"TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
    kind = f"AutoModelFor{classes[task]}" if task in classes else "AutoModel"
    config = t.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )

    def make() -> Any:
        torch.manual_seed(0)
        return getattr(t, kind).from_config(config).eval()

    model = veneer.get_peft_model(make(), veneer.LoraConfig(task_type=task, init_lora_weights=False)).eval()
    heads = {"TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"bert", heads[task]} if task in heads else {"encoder"})
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(make(), tmp_path)
    ids = {"input_ids": IDS}
    for a, b in zip(model(**ids).to_tuple(), again(**ids).to_tuple(), strict=True):
        assert deviation(a, b) <= 1e-5


def test_hub_arguments_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora().save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = []

    def download(repo: str, name: str, **options: Any) -> str:
        asked.append({"repo": repo, "name": name, **options})
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = veneer.PeftModel.from_pretrained(llama(), "me/adapter", revision="v1", token="secret", subfolder="x")
    assert torch.allclose(model(IDS).logits, lora()(IDS).logits)
    assert [a["name"] for a in asked] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(a["repo"] == "me/adapter" and a["revision"] == "v1" and a["token"] == "secret" for a in asked)
    assert all(a["subfolder"] == "x" for a in asked)


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            seen["token"] = token

        def create_repo(self, repo: str, **options: Any) -> Any:
            return type("Made", (), {"repo_id": f"me/{repo}"})

        def upload_folder(self, **options: Any) -> str:
            seen.update(options, files=sorted(p.name for p in Path(options["folder_path"]).iterdir()))
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert lora().push_to_hub("adapter", token="t", commit_message="hello") == "done"
    assert seen["repo_id"] == "me/adapter" and seen["commit_message"] == "hello" and seen["token"] == "t"
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_resized_embeddings_are_saved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = veneer.get_peft_model(base, veneer.LoraConfig()).eval()
    model.save_pretrained(tmp_path / "a")
    keys = load_file(tmp_path / "a/adapter_model.safetensors").keys()
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys
    other = type(llama()).from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(70)
    again = veneer.PeftModel.from_pretrained(other, tmp_path / "a")
    assert deviation(again(IDS).logits, model(IDS).logits) <= 1e-5
    with pytest.raises(veneer.AdapterLoadError, match=r"embed_tokens.weight is \(70, 32\), wanted \(64, 32\)"):
        veneer.PeftModel.from_pretrained(llama(), tmp_path / "a")


def test_state_dicts_in_memory() -> None:
    model, other = lora(), lora(seed=7)
    state = veneer.get_peft_model_state_dict(model)
    assert all(k.startswith("base_model.model.model.layers.") for k in state)
    held = dict(adapter_files.named_tensors(other))
    report = veneer.set_peft_model_state_dict(other, state)
    assert report.clean and report.missing_keys == report.unexpected_keys == []
    assert all(held[k] is v for k, v in adapter_files.named_tensors(other)), (
        "the optimizer's parameters must stay the same"
    )
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(veneer.AdapterLoadError, match="1 not in this adapter"):
        veneer.set_peft_model_state_dict(other, {**state, "x": torch.ones(1)})


def test_switching_under_torch_compile() -> None:
    torch._dynamo.reset()
    model = lora()
    model.add_adapter("b", veneer.LoraConfig(r=2, init_lora_weights=False))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("default", "b", ["default", "b"], "default"):
        model.set_adapter(name)
        assert deviation(compiled(IDS).logits, model(IDS).logits) <= 1e-5
    with model.disable_adapter():
        assert deviation(compiled(IDS).logits, model(IDS).logits) <= 1e-5
