"""Bad input gets a clear error and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from small import IDS, bits, llama, lora

BAD_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("LoraConfig", {"r": 0}, r"r=0.*whole number"),
    ("LoraConfig", {"r": -4}, r"r=-4"),
    ("LoraConfig", {"r": 2.5}, r"r=2\.5"),
    ("LoraConfig", {"lora_dropout": 1.0}, r"lora_dropout=1\.0.*\[0, 1\)"),
    ("LoraConfig", {"lora_alpha": 0}, r"lora_alpha=0"),
    ("LoraConfig", {"bias": "some"}, r"'none', 'all', 'lora_only'"),
    ("LoraConfig", {"init_lora_weights": "pisa"}, r"'pissa'"),
    ("LoraConfig", {"task_type": "CAUSAL"}, r"did you mean 'CAUSAL_LM'"),
    ("LoraConfig", {"peft_type": "IA3"}, r"config of 'LORA'"),
    ("LoraConfig", {"use_bdlora": {"nblocks": 2}}, r"does not support 'use_bdlora' yet"),
    ("LoraConfig", {"rank_pattern": {"q": 0}}, r"rank_pattern"),
    ("OFTConfig", {"r": 2, "oft_block_size": 4}, r"give one of them"),
    ("OFTConfig", {"oft_block_size": 0}, r"give one of them"),
    ("VeraConfig", {"r": 0}, r"r=0"),
    ("LoHaConfig", {"rank_dropout": -0.1}, r"rank_dropout=-0\.1"),
    ("TrainableTokensConfig", {"token_indices": [1, 1]}, r"different row numbers"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_CONFIGS)
def test_configs(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(veneer, name)(**options)


def test_an_unknown_argument_suggests_the_known_one() -> None:
    with pytest.raises(TypeError, match="did you mean 'lora_alpha'"):
        veneer.LoraConfig(lora_alfa=3)
    with pytest.raises(AttributeError, match="LORA"):
        veneer.PeftType.LORRA  # noqa: B018


BAD_ATTACHMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("LoraConfig", {"target_modules": ["q_projj"]}, r"did you mean .*q_proj"),
    ("LoraConfig", {"target_modules": "("}, r"\("),
    ("LoraConfig", {"target_modules": ["act_fn"]}, r"act_fn"),
    ("LoraConfig", {"modules_to_save": ["lm_hed"]}, r"did you mean 'lm_head'"),
    (
        "LoraConfig",
        {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
        r"matches only .lm_head., which modules_to_save",
    ),
    ("LoraConfig", {"trainable_token_indices": [5000]}, r"beyond its 64 rows"),
    ("OFTConfig", {"oft_block_size": 7, "target_modules": ["q_proj"]}, r"7 does not divide its 32.*nearest: 8"),
    ("LoraConfig", {"r": 64, "init_lora_weights": "pissa"}, r"r=64 is above the rank"),
    ("LoraConfig", {"layers_to_transform": [9], "target_modules": ["q_proj"]}, r"9"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_ATTACHMENTS)
def test_attaching(name: str, options: dict[str, Any], message: str) -> None:
    base = llama()
    start, kinds = bits(base), [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=message):
        veneer.get_peft_model(base, getattr(veneer, name)(**options))
    assert bits(base) == start and [type(m) for m in base.modules()] == kinds
    assert all(p.requires_grad for p in base.parameters()), "a failed attachment must not freeze the model"
    veneer.get_peft_model(base, veneer.LoraConfig())


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a:b", "a\\b", " a", "__base__", 3])
def test_adapter_names(name: Any) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        lora().add_adapter(name, veneer.LoraConfig())


def test_an_adapter_name_that_exists() -> None:
    model = lora()
    with pytest.raises(ValueError, match="'default' exists already"):
        model.add_adapter("default", veneer.LoraConfig())
    with pytest.raises(ValueError, match="no adapter is named 'defualt'.*did you mean 'default'"):
        model.set_adapter("defualt")
    with pytest.raises(TypeError, match="pass a config"):
        veneer.get_peft_model(llama(), {"r": 8})
    with pytest.raises(ValueError, match="PeftModel already"):
        veneer.get_peft_model(model, veneer.LoraConfig())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lora().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors[KEY + "x"] = tensors.pop(KEY)


BAD_FILES: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop(KEY), "1 missing from the file: " + KEY),
    "extra": (lambda t: t.update(more=torch.ones(2)), "1 not in this adapter: more"),
    "renamed": (rename, "another base architecture"),
    "shape": (lambda t: t.update({KEY: torch.ones(3, 32)}), r"is \(3, 32\), wanted \(4, 32\)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit(case: str, folder: Path) -> None:
    change, message = BAD_FILES[case]
    edit(folder, change)
    model = lora()
    before, names = model(IDS).logits, [n for n, _ in model.named_parameters()]
    with pytest.raises(veneer.AdapterLoadError, match=message) as caught:
        model.load_adapter(folder, "other")
    assert not caught.value.report.clean
    assert [n for n, _ in model.named_parameters()] == names and torch.equal(model(IDS).logits, before)
    with pytest.warns(UserWarning, match=message):
        report = model.load_adapter(folder, "other", strict=False)
    assert not report.clean
    model.set_adapter("other")
    assert model(IDS).logits.isfinite().all()


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    for size in (0, 5, 200, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is damaged"):
            veneer.PeftModel.from_pretrained(llama(), folder)


def test_configs_in_files(folder: Path, tmp_path: Path) -> None:
    path = folder / "adapter_config.json"
    good = json.loads(path.read_text())

    def write(**changes: Any) -> None:
        path.write_text(json.dumps({**good, **changes}))

    write(shiny=None, shinier=False, shiniest={})
    with pytest.warns(UserWarning, match="shinier, shiniest, shiny") as seen:
        veneer.PeftConfig.from_pretrained(folder)
    assert len(seen) == 1
    for changes, message in (
        ({"shiny": 3}, "shiny=3 is a field that LoraConfig does not know"),
        ({"use_qalora": True}, "does not support 'use_qalora' yet"),
        ({"peft_type": "LORRA"}, "did you mean 'LORA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"r": "8"}, "r='8'"),
    ):
        write(**changes)
        with pytest.raises(ValueError, match=message):
            veneer.PeftModel.from_pretrained(llama(), folder)
    write()
    with pytest.raises(ValueError, match="a config of 'LORA'"):
        veneer.IA3Config.from_pretrained(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        veneer.PeftConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        veneer.PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        veneer.PeftConfig.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="inside"):
        veneer.PeftConfig.from_pretrained(folder, subfolder="../..")


def test_bin_files_are_read_without_running_code(folder: Path) -> None:
    import pickle

    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    model = veneer.PeftModel.from_pretrained(llama(), folder)
    assert torch.allclose(model(IDS).logits, lora()(IDS).logits)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError, match="plain tensors"):
        veneer.PeftModel.from_pretrained(llama(), folder)
    assert not (folder / "ran").exists()


def test_saving(tmp_path: Path) -> None:
    model = lora()
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="no adapter is named"):
        model.save_pretrained(tmp_path, selected_adapters=["x"])
    assert (tmp_path / "file").read_text() == "mine"
    hollow = veneer.get_peft_model(llama(), veneer.LoraConfig(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="holds no data"):
        hollow.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path: Path, data: bytes) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        lora(seed=9).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1, "all files must be as readable as each other"


def test_attaching_after_fully_shard() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        model = nn.Sequential(nn.Linear(8, 8))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(RuntimeError, match="attach adapters before sharding"):
            veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["0"]))
    finally:
        dist.destroy_process_group()
