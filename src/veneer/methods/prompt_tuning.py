"""Prompt tuning: trained embeddings in front of the input.

References:
    Lester et al. 2021, arxiv.org/abs/2104.08691
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers.site import Site
from .checks import check_one_of
from .hooks import Tensors
from .prompt_learning import PROMPT, PromptLearningConfig
from .registry import method


@method("PROMPT_TUNING")
@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning. Lester et al. 2021, arxiv.org/abs/2104.08691, section 2:  y = f([P; X])

    Args:
        num_virtual_tokens: virtual tokens in front of each sequence, each with a trained embedding.
        prompt_tuning_init: "RANDOM" starts from a standard normal distribution, "SAMPLE_VOCAB" from embeddings of random
            tokens, "TEXT" from those of `prompt_tuning_init_text`.
        prompt_tuning_init_text: the text whose tokens the prompt starts from, repeated until it fills the prompt.
        tokenizer_name_or_path: tokenizer for that text, a hub id or folder.
        tokenizer_kwargs: arguments for loading the tokenizer.
        token_dim: width of a virtual token; None for that of the model's embeddings.
        num_transformer_submodules: stacks for which the table has rows; None for 2 with task SEQ_2_SEQ_LM, else 1.
        virtual_tokens_in: where an encoder-decoder has them: "encoder", "decoder" or "both"; None for the encoder, as in
            peft, which does not know this field.
        num_attention_heads: kept for peft's files; has no effect.
        num_layers: kept for peft's files; has no effect.
        modules_to_save: modules trained as full copies and saved with the adapter.

    Raises:
        ValueError: a text without a tokenizer, or with more tokens than there are virtual tokens.
    """

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    virtual_tokens_in: str | None = None

    recipe = {"learning_rate": 1e-2, "warmup": 10, "prompt_tuning_init": "SAMPLE_VOCAB"}
    tensors = {"embedding": PROMPT}
    own_fields = frozenset({"virtual_tokens_in"})

    def check(self) -> None:
        super().check()
        self.check_where(self.virtual_tokens_in)
        self.prompt_tuning_init = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))
        self.check_start()
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ValueError(f"{type(self).__name__}(prompt_tuning_init='TEXT'): needs {name}")
        elif self.tokenizer_kwargs:
            raise ValueError(
                f"{type(self).__name__}(tokenizer_kwargs={self.tokenizer_kwargs!r}): only prompt_tuning_init='TEXT' uses a "
                "tokenizer"
            )

    def check_start(self) -> None:
        check_one_of(self, ("RANDOM", "SAMPLE_VOCAB", "TEXT"), prompt_tuning_init=self.prompt_tuning_init)

    def init(self, site: Site) -> dict[str, Tensor]:
        shape = (self.total_virtual_tokens, self.token_dim or site.fan_out)  # (T, width)
        if self.prompt_tuning_init in ("TEXT", "SAMPLE_VOCAB"):
            return {"embedding": site.computed(shape, lambda: word_rows(site, self.start_ids(site)))}
        return {"embedding": site.normal(*shape)}

    def loaded(self, site: Site) -> dict[str, Tensor]:
        return {"embedding": site.empty(self.total_virtual_tokens, self.token_dim or site.fan_out)}  # (T, width)

    def start_ids(self, site: Site) -> Tensor:
        """Tokens whose embeddings the prompt starts from, (T,)."""
        count = self.total_virtual_tokens
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return torch.randint(0, site.fan_in, (count,))
        from transformers import AutoTokenizer

        options = {k: v for k, v in (self.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}  # may run code
        ids = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **options)(self.prompt_tuning_init_text)[
            "input_ids"
        ]
        if len(ids) > self.num_virtual_tokens:
            raise ValueError(
                f"{type(self).__name__}(num_virtual_tokens={self.num_virtual_tokens}): prompt_tuning_init_text has "
                f"{len(ids)} tokens; use num_virtual_tokens={len(ids)}, or a shorter text"
            )
        if not ids:
            raise ValueError(f"{type(self).__name__}(prompt_tuning_init_text=...): the tokenizer finds no token in it")
        return torch.tensor((ids * math.ceil(count / len(ids)))[:count])

    def prompt(self, p: Tensors, site: Site, tasks: Tensor | None) -> Tensor | None:
        return self.part(p["embedding"], site, self.virtual_tokens_in)  # (T, width)


def word_rows(site: Site, ids: Tensor) -> Tensor:
    """The base model's embeddings of tokens (T,), (T, width), with whatever scale it gives them."""
    table = site.owner.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        rows: Tensor = table(ids.to(table.weight.device))
    return rows
