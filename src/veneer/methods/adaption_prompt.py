"""LLaMA-Adapter: learned tokens that the attentions of the top layers see through a gate that starts closed.

References:
    Zhang et al. 2023, arxiv.org/abs/2303.16199
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..layers.site import Site
from ..targets.defaults import model_type
from ..targets.suggest import suggest
from .base import Method, OtherSublayers
from .checks import check_positive_int
from .hooks import Tensors
from .registry import method
from .tensors import Trained

# Attentions whose queries are those computed here (tests/parity/test_adaption_prompt.py): model type -> their module.
SEPARATE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma")
ATTENTIONS = {**dict.fromkeys(SEPARATE, "self_attn"), "gpt2": "attn"}


@method("ADAPTION_PROMPT")
@dataclass
class AdaptionPromptConfig(Method):
    """LLaMA-Adapter. Zhang et al. 2023, arxiv.org/abs/2303.16199, eq. 6:  y + g * softmax(q K^T / sqrt(d)) V W_o

    K and V are those of `adapter_len` learned tokens at each attention; g starts at 0.

    Args:
        target_modules: name (ending) of the attentions; None for the architecture's.
        adapter_len: learned tokens at each attention; must be given.
        adapter_layers: attentions that get them, counted from the top; must be given.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    tensors = {"prompt": Trained("adaption_prompt"), "gate": Trained("adaption_gate")}
    acts_on = "modules"

    def check(self) -> None:
        given = {n: v for n in ("adapter_len", "adapter_layers") if (v := getattr(self, n)) is not None}
        check_positive_int(self, **given)
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            raise ValueError(
                f"AdaptionPromptConfig(target_modules={self.target_modules!r}): must be one name, such as 'self_attn'"
            )

    def prepare(self, model: nn.Module) -> Self:
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"AdaptionPromptConfig({name}=None): must be a whole number, 1 or more; give {name}=10"
                )
        kind = model_type(model)
        if kind not in ATTENTIONS:
            raise ValueError(
                f"AdaptionPromptConfig: the queries of model type {kind!r} cannot be computed"
                f"{suggest(kind or '', ATTENTIONS)}; there are {', '.join(ATTENTIONS)}; use PrefixTuningConfig instead"
            )
        return self.replace(target_modules=self.target_modules or ATTENTIONS[kind])

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str]:
        named = dict(model.named_modules())
        found = [n for n in named if f".{n}".endswith(f".{self.target_modules}")]
        count = self.adapter_layers or 0
        if not found:
            leaves = {n.rpartition(".")[2] for n in named}
            raise ValueError(
                f"AdaptionPromptConfig: no module is named {self.target_modules!r}"
                f"{suggest(str(self.target_modules), leaves)}"
            )
        if count > len(found):
            raise ValueError(
                f"AdaptionPromptConfig(adapter_layers={count}): the model has {len(found)} attentions named "
                f"{self.target_modules!r}; give {len(found)} or fewer"
            )
        for name in found[-count:]:
            if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= named[name]._modules.keys() and (
                "c_attn" not in named[name]._modules or "q_attn" in named[name]._modules
            ):
                raise ValueError(
                    f"AdaptionPromptConfig: {name!r}, a {type(named[name]).__name__}, is no attention with projections "
                    "q_proj, k_proj, v_proj and o_proj, or c_attn; name the attentions in target_modules"
                )
        return found[-count:]

    def init(self, site: Site) -> dict[str, Tensor]:
        attention: Any = site.owner
        packed = "c_attn" in attention._modules
        width = attention.embed_dim if packed else attention.q_proj.in_features
        return {"prompt": site.normal(1, self.adapter_len or 0, width), "gate": site.zeros(1)}

    def post(self, p: Tensors, site: Site, x: Any, y: Tensor) -> Tensor:
        attention: Any = site.owner
        hidden = x["hidden_states"]  # (B, T, width)
        d = attention.head_dim
        prompt = p["prompt"].to(hidden.dtype)  # (1, n, width)
        packed = "c_attn" in attention._modules
        if packed:
            width = attention.embed_dim
            q = attention.c_attn(hidden)[..., :width]  # (B, T, width)
            k, v = attention.c_attn(prompt)[..., width:].split(width, -1)  # (1, n, width)
        else:
            q, k, v = attention.q_proj(hidden), attention.k_proj(prompt), attention.v_proj(prompt)
        q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))  # (B or 1, heads, T or n, d)
        if "q_norm" in attention._modules:
            q, k = attention.q_norm(q), attention.k_norm(k)
        if x.get("position_embeddings") is not None:
            q = rotate_half(q, *x["position_embeddings"])
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))  # (1, heads, n, d)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(d)  # (B, heads, T, n), eq. 4
        seen = p["gate"].to(q.dtype) * torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)  # eq. 5
        added = (seen @ v).transpose(1, 2).flatten(2)  # (B, T, heads d)
        if not packed:  # GPT-2's have none, as in peft
            out = attention.o_proj
            added = out(added) if out.bias is None else out(added) - out(torch.zeros_like(added[:1, :1]))
        result: Tensor = y + added
        return result


def rotate_half(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, by halves: q (B, heads, T, d), cos and sin (B, T, d)."""
    a, b = q.chunk(2, -1)
    return q * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)
