"""Tiny random models of the architectures that parity is checked on, each with inputs and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import nn

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
MOE = {**DECODER, "num_experts_per_tok": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
WHISPER = {"vocab_size": 64, "d_model": 32, "num_mel_bins": 8, "encoder_layers": 1, "decoder_layers": 1}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WHISPER |= {"max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 1}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"dropout": 0.0, "decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

IDS = (torch.arange(24).reshape(2, 12) * 7 + 3) % 60 + 3  # (2, 12), no special tokens


@dataclass
class Architecture:
    """How to make a model, what to feed it, and which of its parameters are fused experts."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    experts: tuple[str, ...] = ()


def auto(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = getattr(t, f"AutoModelFor{kind}" if kind else "AutoModel").from_config(
            getattr(t, config)(**options), attn_implementation="eager"
        )
        return model.eval()

    return make


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "labels": IDS}


def pictures() -> dict[str, torch.Tensor]:
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).reshape(2, 8, 20).cos(), "labels": IDS[:, :6]}


def labelled() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "labels": torch.tensor([0, 1])}


BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
BART |= {"decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
VIT = {**SIZES, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
del VIT["vocab_size"]

MODELS: dict[str, Architecture] = {
    "llama": Architecture(auto("CausalLM", "LlamaConfig", **DECODER), text),
    "llama_tied": Architecture(auto("CausalLM", "LlamaConfig", **DECODER, tie_word_embeddings=True), text),
    "gpt2": Architecture(
        auto("CausalLM", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32,
             resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), text),
    "bert": Architecture(
        auto("SequenceClassification", "BertConfig", **SIZES, intermediate_size=48, hidden_dropout_prob=0.0,
             attention_probs_dropout_prob=0.0), labelled),
    "roberta": Architecture(
        auto("SequenceClassification", "RobertaConfig", **SIZES, intermediate_size=48, max_position_embeddings=40,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), labelled),
    "bart": Architecture(auto("Seq2SeqLM", "BartConfig", **BART), text),
    "t5": Architecture(auto("Seq2SeqLM", "T5Config", **T5), text),
    "mt5": Architecture(auto("Seq2SeqLM", "MT5Config", **T5), text),
    "opt": Architecture(
        auto("CausalLM", "OPTConfig", **SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32,
             dropout=0.0), text),
    "whisper": Architecture(auto("SpeechSeq2Seq", "WhisperConfig", **WHISPER), sound),
    "vit": Architecture(auto("ImageClassification", "ViTConfig", **VIT), pictures),
    "mixtral": Architecture(auto("CausalLM", "MixtralConfig", **MOE, num_local_experts=4), text, EXPERTS),
    "qwen3_moe": Architecture(
        auto("CausalLM", "Qwen3MoeConfig", **MOE, num_experts=4, moe_intermediate_size=24, head_dim=8), text, EXPERTS),
    "gpt_oss": Architecture(
        auto("CausalLM", "GptOssConfig", **MOE, num_local_experts=4, head_dim=8), text, EXPERTS),
}  # fmt: skip
