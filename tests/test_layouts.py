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
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

import veneer
from small import llama, lora, scramble
from veneer import codec

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
    new = load_file(tmp_path / codec.WEIGHTS_NAME)
    old = {}
    for key, tensor in new.items():
        for now, then in paths.items():
            key = key.replace(f"base_model.model.{now}", f"base_model.model.{then}")
        old[key] = tensor
    assert not old.keys() & new.keys()
    save_file(old, tmp_path / codec.WEIGHTS_NAME)
    with pytest.warns(UserWarning, match="of a layout of another release"):
        loaded = veneer.PeftModel.from_pretrained(make(), tmp_path, strict=strict)
    assert torch.equal(loaded(input_ids=IDS).logits, wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / codec.WEIGHTS_NAME).keys() == new.keys()


def test_files_of_today_are_left_alone(tmp_path: Path) -> None:
    for name, (make, targets, _) in CASES.items():
        model = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, target_modules=targets))
        model.save_pretrained(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            veneer.PeftModel.from_pretrained(make(), tmp_path / name)


def test_what_no_table_knows_is_refused_as_before(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path)
    state = load_file(tmp_path / codec.WEIGHTS_NAME)
    save_file({k.replace("self_attn", "elsewhere"): v for k, v in state.items()}, tmp_path / codec.WEIGHTS_NAME)
    config = json.loads((tmp_path / codec.CONFIG_NAME).read_text())
    assert config["peft_type"] == "LORA"
    with pytest.raises(veneer.AdapterLoadError, match="elsewhere"):
        veneer.PeftModel.from_pretrained(llama(), tmp_path)
