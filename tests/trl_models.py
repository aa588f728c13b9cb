"""Tiny models and a tokenizer with a chat template, for TRL's trainers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make(folder: Path, texts: list[str]) -> None:
    """Write `causal`, `tied` and `classifier` into a folder, with a tokenizer of the words of the texts."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "</s>", "<system>", "<user>", "<assistant>"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=64
    )
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # at the usual 0.02 a tiny model's adapters would hardly show
        for parameter in causal.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    causal.save_pretrained(folder / "causal")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tied")
    config.tie_word_embeddings = False
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "classifier")
    for name in ("causal", "tied", "classifier"):
        tokenizer.save_pretrained(folder / name)
