"""Tiny models of a few words, saved with their tokenizer, and data for them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = ["red", "green", "blue", "one", "two", "three"]
PAIRS = [{"prompt": f"say {w} {i}", "completion": f" {w} {w}"} for i in range(8) for w in WORDS]
LABELLED = [{"text": f"{w} {i}", "label": "colour" if w in WORDS[:3] else "number"} for i in range(8) for w in WORDS]


def write_models(folder: Path) -> None:
    """Models "causal", "opt", "classifier" and "seq2seq", each in a folder of its name."""
    plain = Tokenizer(models.WordLevel(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [f"{p['prompt']} {p['completion']}" for p in PAIRS]
    plain.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64
    )
    torch.manual_seed(0)
    n = len(tokenizer)
    sizes = {
        "vocab_size": n,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    made = {
        "causal": AutoModelForCausalLM.from_config(LlamaConfig(**sizes, eos_token_id=2, pad_token_id=0)),
        "opt": AutoModelForCausalLM.from_config(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, eos_token_id=2, pad_token_id=0)),
        "classifier": AutoModelForSequenceClassification.from_config(BertConfig(**sizes)),
        "seq2seq": T5ForConditionalGeneration(
            T5Config(vocab_size=n, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, eos_token_id=2,
                     pad_token_id=0, decoder_start_token_id=0)),
    }  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
