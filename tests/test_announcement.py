"""The numbers of peft's announcement, on mt0-large's shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, MT5Config

from veneer import LoraConfig, TaskType, get_peft_model

# bigscience/mt0-large, with the output head of its own that the released checkpoint has.
MT0_LARGE = {"vocab_size": 250112, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}
MT0_LARGE |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def test_trainable_parameters_of_mt0_large(capsys: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(MT5Config(**MT0_LARGE))
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))  # transformers 5 ties MT5's whatever
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    get_peft_model(model, peft_config).print_trainable_parameters()
    expected = "trainable params: 2,359,296 || all params: 1,231,940,608 || trainable%: 0.1915\n"
    assert capsys.readouterr().out == expected
