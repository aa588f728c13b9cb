"""Twenty steps of AdamW from one file, for what test_parity.py does not train: the curves and the files after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs
import peft
import pytest
import torch
from safetensors.torch import load_file

import veneer
from models import EXPERTS, MODELS
from small import deviation
from veneer.algebra import modes

pytestmark = pytest.mark.filterwarnings("ignore")
NORM = {"llama": "norm", "gpt2": "ln_f", "t5": "final_layer_norm", "bert": "LayerNorm"}
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}, tuple(NORM)),
    "tokens": ("LoraConfig", {"r": 4, "trainable_token_indices": [3, 10, 17]}, tuple(NORM)),
    "copies": ("LoraConfig", {"r": 4, "modules_to_save": []}, tuple(NORM)),
    "bias": ("LoraConfig", {"r": 4, "use_rslora": True, "bias": "all"}, ("bert", "t5")),
    "coft": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 1e-3}, ("llama", "t5", "bert")),
    "experts": (
        "LoraConfig",
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": list(EXPERTS)},
        ("mixtral", "qwen3_moe", "gpt_oss"),
    ),
}


@pytest.mark.parametrize(("case", "name"), [(c, n) for c, (_, _, names) in CASES.items() for n in names])
def test_training(case: str, name: str, tmp_path: Path) -> None:
    config, options, _ = CASES[case]
    if case == "copies":
        options = {**options, "modules_to_save": [NORM[name]]}
    pairs.make(peft, MODELS[name].make(), config, options, tmp_path)
    curves, files = [], []
    for library in (peft, veneer):
        model = pairs.load(library, MODELS[name].make(), tmp_path).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(20):
            loss = pairs.runner(name)(model)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
        if case == "coft":  # peft pulls a rotation back at the next forward, Veneer after the step
            pairs.runner(name)(model)
        model.save_pretrained(str(tmp_path / library.__name__))
        files.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors"))
    assert deviation(curves[0], curves[1]) <= 1e-4
    assert curves[1][-1] < curves[1][0]
    # A tensor with no gradient but rounding (a key bias under softmax) is moved by Adam as far as any other.
    assert all(pairs.gap(files[1][key], files[0][key]) <= 1e-2 for key in files[1])


@pytest.mark.parametrize(("config", "options"), [
    ("LoraConfig", {"r": 4, "lora_dropout": 0.3}), ("VeraConfig", {"r": 5, "vera_dropout": 0.3}),
])  # fmt: skip
def test_dropout_draws_what_peft_draws(config: str, options: dict[str, Any], tmp_path: Path) -> None:
    pairs.make(peft, MODELS["llama"].make(), config, options, tmp_path)
    losses = []
    for library in (peft, veneer):
        model = pairs.load(library, MODELS["llama"].make(), tmp_path).train()
        torch.manual_seed(7)
        with modes.reference_only():  # the kernels draw other masks of the same distribution, faster
            losses.append([pairs.runner("llama")(model)[1].item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert len(set(losses[0])) > 1, "dropout did nothing"
