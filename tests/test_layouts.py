"""Adapters that were trained on modules which another release of transformers has under other paths."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import veneer
from small import deviation, llama, lora, scramble
from veneer.io import locate
from veneer.io.fingerprint import BaseMismatchWarning
from veneer.methods.registry import METHODS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(2, 12)[None]  # (1, 10)


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(**SIZES, vocab_size=64)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    ).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=64, num_key_value_heads=2, num_local_experts=4)).eval()


# model, targets, new path -> the path that release 4 had
CASES = {
    "llava": (llava, ["q_proj", "v_proj"], {"model.language_model.": "language_model.model.",
                                           "model.vision_tower.": "vision_tower.vision_model."}),
    "mixtral": (mixtral, ["q_proj", "v_proj"], {}),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_of_release_4_goes_where_the_modules_are_now(strict: bool, tmp_path: Path) -> None:
    make, targets, paths = CASES["llava"]
    model = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, target_modules=targets))
    scramble(model)
    wanted = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    new = load_file(tmp_path / locate.WEIGHTS_NAME)
    old = {}
    for key, tensor in new.items():
        for now, then in paths.items():
            key = key.replace(f"base_model.model.{now}", f"base_model.model.{then}")
        old[key] = tensor
    assert not old.keys() & new.keys()
    save_file(old, tmp_path / locate.WEIGHTS_NAME)
    with pytest.warns(UserWarning, match="of a layout of another release"):
        loaded = veneer.PeftModel.from_pretrained(make(), tmp_path, strict=strict)
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / locate.WEIGHTS_NAME).keys() == new.keys()


# Configs of the methods on layers and modules whose files name the modules that they act on. What has no name of its own there
# (biases, norms, whole copies) is moved too.
LLAVA_CONFIGS = {
    "IA3": {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm", "layer_norm1"]},
    "BITFIT": {"target_modules": ["layer_norm1", "fc1"]},
    "BOTTLENECK": {"reduction_factor": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5], "target_modules": "embed_tokens"},
}
NAMED_BY_MODULE = sorted(
    n
    for n, c in METHODS.items()
    if c.acts_on in ("layers", "modules") and n not in ("ADAPTION_PROMPT", "ADAPTER_FUSION")
)


@pytest.mark.parametrize("name", NAMED_BY_MODULE)
def test_every_method_goes_where_the_modules_are_now(name: str, tmp_path: Path) -> None:
    make, targets, paths = CASES["llava"]
    config = METHODS[name](**LLAVA_CONFIGS.get(name, {"target_modules": targets}))
    model = veneer.get_peft_model(make(), config)
    scramble(model)
    wanted = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    new, old = load_file(tmp_path / locate.WEIGHTS_NAME), {}
    for key, tensor in new.items():
        for now, then in paths.items():
            key = key.replace(f"base_model.model.{now}", f"base_model.model.{then}")
        old[key] = tensor
    own = [k for k, t in model.base_model.model.named_parameters() if t.requires_grad]
    assert own and len(old.keys() & new.keys()) < len(new)  # shared tensors stand below no module
    save_file(old, tmp_path / locate.WEIGHTS_NAME)
    with pytest.warns(UserWarning, match="of a layout of another release"):
        loaded = veneer.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)


def test_a_head_that_is_trained_whole_goes_along(tmp_path: Path) -> None:
    make, targets, paths = CASES["llava"]
    copied = ["multi_modal_projector.linear_1", "language_model.norm"]
    model = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, target_modules=targets, modules_to_save=copied))
    scramble(model)
    wanted = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    old = {}
    for key, tensor in load_file(tmp_path / locate.WEIGHTS_NAME).items():
        for now, then in paths.items():
            key = key.replace(f"base_model.model.{now}", f"base_model.model.{then}")
        old[key] = tensor
    assert "base_model.model.language_model.model.norm.weight" in old
    save_file(old, tmp_path / locate.WEIGHTS_NAME)
    with pytest.warns(UserWarning, match="of a layout of another release"):
        loaded = veneer.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)


def test_files_of_today_are_left_alone(tmp_path: Path) -> None:
    for name, (make, targets, _) in CASES.items():
        model = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, target_modules=targets))
        model.save_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            veneer.PeftModel.from_pretrained(make(), tmp_path / name)


def test_what_no_table_knows_is_refused_as_before(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path)
    state = load_file(tmp_path / locate.WEIGHTS_NAME)
    save_file({k.replace("self_attn", "elsewhere"): v for k, v in state.items()}, tmp_path / locate.WEIGHTS_NAME)
    config = json.loads((tmp_path / locate.CONFIG_NAME).read_text())
    assert config["peft_type"] == "LORA"
    with pytest.raises(veneer.AdapterLoadError, match="elsewhere"):
        veneer.PeftModel.from_pretrained(llama(), tmp_path)


def experts_of_release_4(r: int, seed: int = 0, partial: bool = False) -> dict[str, torch.Tensor]:
    """LoRA as release 4 had it: two factors for each layer of each expert."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for expert in range(4):
            for leaf, (out, width) in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
                if partial and (leaf == "w3" or expert == 2):
                    continue
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                found[f"{path}.lora_A.weight"] = torch.randn(r, width, generator=generator) * 0.1
                found[f"{path}.lora_B.weight"] = torch.randn(out, r, generator=generator) * 0.1
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        found[f"{path}.lora_A.weight"] = torch.randn(r, 32, generator=generator) * 0.1
        found[f"{path}.lora_B.weight"] = torch.randn(32, r, generator=generator) * 0.1
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / locate.WEIGHTS_NAME)
    veneer.LoraConfig(**fields).save_pretrained(folder)
    return folder


def added(model: Any, tensors: dict[str, torch.Tensor], scales: dict[str, float]) -> Any:
    """The base model with the layers' B A in its weights, by the plain formula."""
    with torch.no_grad():
        for key, A in tensors.items():
            if not key.endswith("lora_A.weight"):
                continue
            path = (
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace("block_sparse_moe", "mlp")
            )
            leaf = path.rpartition(".")[2]
            change = scales.get(leaf, scales[""]) * tensors[key.replace("lora_A", "lora_B")] @ A
            if ".experts." in path:
                owner, _, rest = path.partition(".experts.")
                experts, n = model.get_submodule(f"{owner}.experts"), int(rest.split(".")[0])
                if leaf == "w2":
                    experts.down_proj[n] += change
                else:
                    experts.gate_up_proj[n, 48 * (leaf == "w3") : 48 * (leaf == "w3") + 48] += change
            else:
                model.get_submodule(path).weight += change
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_experts_of_release_4_become_stacked_ones(rslora: bool, partial: bool, tmp_path: Path) -> None:
    tensors = experts_of_release_4(r=3, partial=partial)
    fields: dict[str, Any] = {"r": 3, "lora_alpha": 6, "use_rslora": rslora, "alpha_pattern": {"w3": 12, "q_proj": 3}}
    write(tmp_path / "old", tensors, target_modules=["w1", "w2", "w3", "q_proj"], **fields)
    root = 3**0.5 if rslora else 3
    wanted = added(mixtral(), tensors, {"": 6 / root, "w3": 12 / root, "q_proj": 3 / root})(input_ids=IDS).logits
    with pytest.warns(UserWarning, match=r"layers such as .*experts.0.w1 are 4 fused ones here"):
        model = veneer.PeftModel.from_pretrained(mixtral(), tmp_path / "old")
    plain = mixtral()(input_ids=IDS).logits
    assert (model(input_ids=IDS).logits - wanted).abs().max() < 1e-4 * (wanted - plain).abs().max()
    model.save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = veneer.PeftModel.from_pretrained(mixtral(), tmp_path / "new")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model.merge_adapter()
    assert (model(input_ids=IDS).logits - wanted).abs().max() < 1e-4 * (wanted - plain).abs().max()


def test_peft_says_the_same_of_experts_of_release_4(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tensors = experts_of_release_4(r=2)
    write(tmp_path, tensors, r=2, lora_alpha=4, target_modules=["w1", "w2", "w3", "q_proj"])
    theirs = mixtral()
    theirs.load_adapter(str(tmp_path))  # transformers' own way, with peft
    del peft
    with pytest.warns(UserWarning, match="another release"):
        ours = veneer.PeftModel.from_pretrained(mixtral(), tmp_path)
    assert deviation(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits) <= 1e-5


def phi3() -> Any:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES, vocab_size=64, num_key_value_heads=2, pad_token_id=0)).eval()


def apart() -> Any:
    """The Llama with the weights of `phi3`, each fused layer in its parts."""
    fused, plain = phi3(), LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=2, rms_norm_eps=1e-5)
    model = LlamaForCausalLM(plain).eval()
    state = fused.state_dict()
    for key in list(state):
        for name, leaves, rows in (("qkv_proj", "qkv", (32, 16, 16)), ("gate_up_proj", ("gate", "up"), (48, 48))):
            if f".{name}." in key:
                for leaf, part in zip(leaves, state[key].split(rows), strict=True):
                    state[key.replace(name, f"{leaf}_proj")] = part
                del state[key]
                break
    model.load_state_dict(state)
    return model


def test_fused_and_separate_layers_both_ways(tmp_path: Path) -> None:
    assert deviation(phi3()(input_ids=IDS).logits, apart()(input_ids=IDS).logits) <= 1e-5
    separate = veneer.get_peft_model(apart(), veneer.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
                                                                rank_pattern={"v_proj": 3}, alpha_pattern={"up_proj": 5}))  # fmt: skip
    scramble(separate)
    separate.eval().save_pretrained(tmp_path / "separate")
    with pytest.warns(UserWarning, match="fused ones here"):
        loaded = veneer.PeftModel.from_pretrained(phi3(), tmp_path / "separate", strict=False)
    assert deviation(loaded(input_ids=IDS).logits, separate(input_ids=IDS).logits) <= 1e-5
    fused = veneer.get_peft_model(phi3(), veneer.LoraConfig(r=2, target_modules=["qkv_proj", "gate_up_proj", "o_proj"]))
    scramble(fused)
    fused.eval().save_pretrained(tmp_path / "fused")
    with pytest.warns(UserWarning, match="layers that were fused are apart here"):
        loaded = veneer.PeftModel.from_pretrained(apart(), tmp_path / "fused", strict=False)
    assert deviation(loaded(input_ids=IDS).logits, fused(input_ids=IDS).logits) <= 1e-5


def test_what_is_not_the_same_on_fused_layers_is_refused(tmp_path: Path) -> None:
    model = veneer.get_peft_model(apart(), veneer.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path)
    with pytest.warns(BaseMismatchWarning), pytest.raises(ValueError, match="use_dora=True is not the same on those"):
        veneer.PeftModel.from_pretrained(phi3(), tmp_path, strict=False)
