"""The tiny models of the AdapterHub golden files, for the library that writes them and for the tests that read them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"max_position_embeddings": 16}
NODROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {"vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
BART |= {"decoder_start_token_id": 2, "dropout": 0.0, **SPECIAL}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
VIT = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
VIT |= {"image_size": 8, "patch_size": 4, **NODROP}

IDS = (torch.arange(12).reshape(2, 6) * 7 + 3) % 28 + 3  # (2, 6), no special tokens

SEQ = ("seq_bn", {"reduction_factor": 4})
PLAIN = {
    "seq_bn": SEQ,
    "double_seq_bn": ("double_seq_bn", {"reduction_factor": 4}),
    "par_bn": ("par_bn", {"reduction_factor": 4}),
    "compacter": ("compacter", {"reduction_factor": 4}),
}
CROSS = {k: (kind, {**o, "cross_adapter": k in ("double_seq_bn", "compacter")}) for k, (kind, o) in PLAIN.items()}
MORE = {
    "seq_bn_bin": SEQ,
    "norms": ("seq_bn", {"reduction_factor": 4, "ln_before": True, "ln_after": True, "residual_before_ln": "post_add"}),
    "norms_inside": (
        "double_seq_bn",
        {"reduction_factor": 4, "ln_after": True, "adapter_residual_before_ln": True, "non_linearity": "gelu"},
    ),
    "residual_behind": ("seq_bn", {"reduction_factor": 4, "residual_before_ln": False}),
    "plus": ("adapter_plus", {"reduction_factor": 4, "stochastic_depth": 0.0}),
    "learned": ("par_bn", {"reduction_factor": 4, "scaling": "learned", "mh_adapter": True}),
    "gated": ("double_seq_bn", {"reduction_factor": 4, "use_gating": True, "leave_out": [0]}),
    "by_layer": ("seq_bn", {"reduction_factor": {"0": 2, "default": 4}}),
    "compacter_own": (
        "compacter",
        {"reduction_factor": 4, "shared_phm_rule": False, "factorized_phm_rule": True, "factorized_phm_W": False},
    ),
    "compacter_shared": (
        "compacter++",
        {"reduction_factor": 4, "shared_W_phm": True, "factorized_phm_rule": True, "phm_bias": False, "phm_rank": 2},
    ),
}


@dataclass
class Model:
    kind: str
    config: str
    options: dict[str, Any]
    configs: dict[str, Any]

    def make(self) -> Any:
        torch.manual_seed(0)
        config = getattr(t, self.config)(**self.options)
        return getattr(t, f"AutoModelFor{self.kind}").from_config(config, attn_implementation="eager").eval()


MODELS = {
    "bert": Model("SequenceClassification", "BertConfig", {**SIZES, **NODROP}, {**PLAIN, **MORE}),
    "roberta": Model(
        "MaskedLM", "RobertaConfig", {**SIZES, **NODROP, **SPECIAL, "max_position_embeddings": 18}, dict(PLAIN)
    ),
    "gpt2": Model(
        "CausalLM", "GPT2Config", GPT2,
        {**PLAIN, **{k: MORE[k] for k in ("norms_inside", "residual_behind", "plus", "learned", "gated")}},
    ),
    "llama": Model("CausalLM", "LlamaConfig", {**SIZES, **SPECIAL, "num_key_value_heads": 1}, dict(PLAIN)),
    "bart": Model("Seq2SeqLM", "BartConfig", BART, {**CROSS, "plus": MORE["plus"]}),
    "t5": Model("Seq2SeqLM", "T5Config", T5, dict(CROSS)),
    "vit": Model("ImageClassification", "ViTConfig", VIT, dict(PLAIN)),
}  # fmt: skip
FUSED = {
    "bert_fused": ("bert", [SEQ, ("seq_bn", {"reduction_factor": 2, "non_linearity": "gelu"})], "dynamic"),
    "bert_fused_static": ("bert", [PLAIN["double_seq_bn"]] * 3, "static"),
    "gpt2_fused": ("gpt2", [SEQ, SEQ], "dynamic"),
}


def fill(model: Any, only: Iterable[str] = (), scale: float = 0.2, rename: Callable[[str], str] = lambda n: n) -> None:
    """Give every parameter values that follow from its name alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = rename(name)
            if only and not any(part in name for part in only):
                continue
            phase = zlib.crc32(name.encode()) % 1000
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + phase).float()
            centre = 1.0 if re.search(r"norm.*weight$|ln_\w+\.weight$", name.lower()) else 0.0
            parameter.copy_((centre + scale * wave).reshape(parameter.shape))


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.linspace(-3, 3, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin()}
    if name in ("bart", "t5"):
        return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    return {"input_ids": IDS}


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits.contiguous()


def old_vit_name(name: str) -> str:
    """A ViT parameter's name in transformers 5, as transformers 4 calls it."""
    for new, old in (
        (r"^vit\.layers\.", "vit.encoder.layer."),
        (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1_proj."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ):
        name = re.sub(new, old, name)
    return name.replace("q_proj", "query").replace("k_proj", "key").replace("v_proj", "value")
