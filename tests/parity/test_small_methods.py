"""Norm tuning, (IA)^3 and adaption prompts against peft on every architecture that it has them for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs
import peft
import pytest
import torch

import veneer
from models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")

NORMS = {
    "bert": ["LayerNorm"], "roberta": ["LayerNorm"], "opt": ["self_attn_layer_norm", "final_layer_norm"],
    "whisper": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "layer_norm"],
    "vit": ["layernorm_before", "layernorm_after"], "mixtral": ["input_layernorm", "norm"],
}  # fmt: skip
LN: list[Any] = [  # no targets: peft's defaults
    *[(name, {}) for name in ("llama", "llama_tied", "gpt2", "t5", "mt5", "bart")],
    *[(name, {"target_modules": found}) for name, found in NORMS.items()],
    ("llama", {"target_modules": r".*\.0\..*layernorm", "modules_to_save": ["lm_head"]}),
    ("bert", {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"}),
    # What else peft copies: a table, a head, a layer with a bias, one stored transposed, whole blocks.
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "norm"]}),
    ("gpt2", {"target_modules": ["c_fc", "ln_f", "wpe"]}),
    ("opt", {"target_modules": ["fc1"]}),
    ("llama", {"target_modules": ["layers.1.mlp"]}),
    ("qwen3_moe", {"target_modules": ["mlp"]}),
]


@pytest.mark.parametrize(("name", "options"), LN)
def test_norm_tuning(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pairs.exchange(MODELS[name].make, "LNTuningConfig", options, pairs.runner(name), tmp_path)


def test_norm_tuning_merges_as_in_peft(tmp_path: Path) -> None:
    run, base = pairs.runner("llama"), MODELS["llama"].make
    pairs.make(peft, base(), "LNTuningConfig", {}, tmp_path)
    plain = [pairs.load(library, base(), tmp_path).merge_and_unload() for library in (veneer, peft)]
    assert pairs.gap(*(pairs.output(m, run) for m in plain)) <= 1e-6
    a, b = (m.state_dict() for m in plain)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-7, rtol=0) for k in a)
