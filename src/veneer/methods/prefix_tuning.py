"""Prefix tuning, also known as P-Tuning v2: trained keys and values in front of every layer's own.

References:
    Li and Liang 2021, arxiv.org/abs/2101.00190
    Liu et al. 2022, arxiv.org/abs/2110.07602 (P-Tuning v2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.site import Site
from .checks import check_one_of, check_positive_int
from .hooks import Tensors
from .prompt_learning import PROMPT, PromptLearningConfig, prompt_size
from .registry import method
from .tensors import Trained


@method("PREFIX_TUNING")
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning. Li and Liang 2021, arxiv.org/abs/2101.00190, eq. 3:  attention(x W_q, [P_k; K], [P_v; V])

    Args:
        num_virtual_tokens: virtual positions in front of each layer's keys and values.
        prefix_projection: compute keys and values from narrow embeddings by a two-layer network (eq. 4) while training;
            the file holds what it computed.
        encoder_hidden_size: width inside that network; None for `token_dim`.
        init_weights: "zero" starts with keys and values of zero, None at random; "vocabulary", which peft does not have,
            with those that the model computes for random tokens (section 7.4), so that it starts as it would with a few
            real tokens more.
        token_dim: width of the keys of a layer, all heads together; None to read it from the model's config.
        num_attention_heads: heads of keys and values; None to read it from the model's config.
        num_layers: layers with a prefix; None for all.
        num_transformer_submodules: 2 for encoder-decoders, whose decoder gets the prefix; None to go by the task.
        modules_to_save: modules trained as full copies and saved with the adapter.

    Raises:
        ValueError: sizes that the model's config does not tell.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    recipe = {"learning_rate": 1e-2, "warmup": 10, "init_weights": "vocabulary"}
    tensors = {"embedding": PROMPT, "transform.*": Trained(shared="first")}

    @classmethod
    def recipe_for(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given.get("prefix_projection") or given.get("task") == "seq2seq-lm":  # where it cannot start as tokens
            return {**cls.recipe, "init_weights": "zero"}
        return cls.recipe

    def check(self) -> None:
        super().check()
        check_one_of(self, (None, "zero", "vocabulary"), init_weights=self.init_weights)
        if self.init_weights == "vocabulary" and self.prefix_projection:
            raise ValueError(
                "PrefixTuningConfig(init_weights='vocabulary'): keys and values to start from cannot be had through "
                "prefix_projection=True; leave one of the two out"
            )
        if self.encoder_hidden_size is not None:
            check_positive_int(self, encoder_hidden_size=self.encoder_hidden_size)
        if self.token_dim and self.num_attention_heads and self.token_dim % self.num_attention_heads:
            raise ValueError(
                f"PrefixTuningConfig(token_dim={self.token_dim}): must be a multiple of num_attention_heads="
                f"{self.num_attention_heads}"
            )

    def prepare(self, model: nn.Module) -> Self:
        prepared = super().prepare(model)
        hidden = self.encoder_hidden_size or prepared.token_dim
        return prepared.replace(encoder_hidden_size=hidden)

    def layers_of(self, model: nn.Module, config: object) -> int:
        names = ("num_hidden_layers", "num_layers", "n_layer")
        decoder = ("num_decoder_layers", "decoder_layers") if getattr(config, "is_encoder_decoder", False) else ()
        return prompt_size(self, model, config, "num_layers", *decoder, *names)

    def shape_of(self, model: nn.Module, config: Any) -> tuple[int, int]:
        """Heads of keys and values, and their width together."""
        names = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
        queries = prompt_size(self, model, config, "num_attention_heads", *names)
        heads = queries
        if isinstance(getattr(config, "num_key_value_heads", None), int):
            heads = config.num_key_value_heads
        elif getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            heads = 1
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        if width is None:
            width = prompt_size(self, model, config, "token_dim", "hidden_size", "n_embd", "d_model") // queries
        return self.num_attention_heads or heads, heads * width

    def roles(self, there: Sequence[str]) -> Sequence[str]:
        return there if "model" in there else ["decoder"]

    @property
    def columns(self) -> int:
        """Numbers a virtual position has in all layers: 2 L width."""
        return (self.num_layers or 0) * 2 * (self.token_dim or 0)

    def init(self, site: Site) -> dict[str, Tensor]:
        zero = self.init_weights == "zero"
        if not self.prefix_projection:
            shape = (self.num_virtual_tokens, self.columns)  # (P, 2 L width)
            if self.init_weights == "vocabulary":
                return {"embedding": site.computed(shape, lambda: self.of_tokens(site))}
            return {"embedding": site.zeros(*shape) if zero else site.normal(*shape)}
        width, hidden = self.token_dim or 0, self.encoder_hidden_size or 0
        return {
            "embedding": site.normal(self.num_virtual_tokens, width),  # (P, width)
            "transform.0.weight": site.kaiming_uniform(hidden, width),
            "transform.0.bias": site.uniform(hidden, bound=width**-0.5),
            "transform.2.weight": site.zeros(self.columns, hidden)
            if zero
            else site.kaiming_uniform(self.columns, hidden),
            "transform.2.bias": site.zeros(self.columns) if zero else site.uniform(self.columns, bound=hidden**-0.5),
        }

    def of_tokens(self, site: Site) -> Tensor:
        """The keys and values that the stack computes for random tokens, (P, 2 L width)."""
        if self.num_transformer_submodules == 2:
            raise ValueError(
                "PrefixTuningConfig(init_weights='vocabulary'): the file's layout for encoder-decoders has no place for "
                "each layer's own keys and values; use init_weights='zero'"
            )
        from transformers import DynamicCache

        stack, P = site.owner, self.num_virtual_tokens
        ids = torch.randint(0, site.fan_in, (1, P), device=site.home)
        cache, training = DynamicCache(), stack.training
        with torch.no_grad():
            stack.eval()(input_ids=ids, use_cache=True, cache=cache)
        stack.train(training)
        both = [t for layer in cache.layers for t in (layer.keys, layer.values)]  # 2 L of (1, heads, P, head width)
        return torch.cat(both).permute(2, 0, 1, 3).flatten(1)

    def loaded(self, site: Site) -> dict[str, Tensor]:
        return {"embedding": site.empty(self.num_virtual_tokens, self.columns)}  # (P, 2 L width)

    def exported(self, p: Tensors, site: Site) -> dict[str, Tensor] | None:
        return {"embedding": self.table(p)} if len(p) > 1 else None

    def table(self, p: Tensors) -> Tensor:
        """Keys and values of every layer side by side, (P, 2 L width)."""
        if "transform.0.weight" not in p:
            return p["embedding"]
        h = torch.tanh(F.linear(p["embedding"], p["transform.0.weight"], p["transform.0.bias"]))  # (P, hidden), eq. 4
        return F.linear(h, p["transform.2.weight"], p["transform.2.bias"])

    def prefix(self, p: Tensors, site: Site) -> Tensor:
        heads = self.num_attention_heads or 1
        table = self.table(p)
        both = table.view(table.shape[0], -1, heads, (self.token_dim or 0) // heads)  # (P, 2 L, heads, head width)
        both = both.permute(1, 2, 0, 3)  # (2 L, heads, P, head width)
        if self.num_transformer_submodules == 2:
            # peft lays encoder-decoders out as if each layer had four: layer i has rows 4 i and 4 i + 1, around the end.
            rows = torch.arange(self.num_layers or 0, device=both.device) * 4 % both.shape[0]
            both = torch.stack([both[rows], both[rows + 1]], 1).flatten(0, 1)
        return both.reshape(-1, 2, *both.shape[1:])  # (L, 2, heads, P, head width)
