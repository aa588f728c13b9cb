"""What all soft prompts share: how many virtual tokens there are, and what the base model's sizes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from ..layers.site import Site
from .base import Method
from .checks import check_one_of, check_positive_int
from .fields import SavedModules
from .peft_types import TaskType
from .tensors import Trained

PROMPT = Trained("prompt_embeddings", shared="first", saved="once")  # the table of the first stack, used by all


@dataclass
class PromptLearningConfig(SavedModules, Method):
    """Base of the configs whose virtual tokens stand in front of a sequence."""

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    file_prefix = "base_model."

    def check_where(self, where: str | None) -> None:
        """Raise ValueError where `virtual_tokens_in` cannot be had."""
        check_one_of(self, (None, "encoder", "decoder", "both"), virtual_tokens_in=where)
        if where == "both" and self.num_transformer_submodules == 1:
            raise ValueError(
                f"{type(self).__name__}(virtual_tokens_in='both'): needs rows for two stacks; set "
                "num_transformer_submodules=2, or task_type='SEQ_2_SEQ_LM'"
            )

    def check(self) -> None:
        check_positive_int(self, num_virtual_tokens=self.num_virtual_tokens)
        sizes = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        check_positive_int(self, **{n: getattr(self, n) for n in sizes if getattr(self, n) is not None})

    @property
    def is_prompt_learning(self) -> bool:
        return True

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def part(self, table: Tensor, site: Site, where: str | None) -> Tensor | None:
        """The rows of a table (..., total, width) that stand in front of a stack, by `virtual_tokens_in`."""
        P = self.num_virtual_tokens
        if site.role == "decoder":
            if where == "both":
                return table[..., P:, :]
            return table[..., :P, :] if where == "decoder" else None
        return table[..., :P, :] if site.role == "model" or where != "decoder" else None

    @property
    def total_virtual_tokens(self) -> int:
        """Rows of the trained table: the virtual tokens of every stack that may have some."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    def prepare(self, model: nn.Module) -> Self:
        config = sizes_of(model)
        changed: dict[str, Any] = {}
        if self.num_transformer_submodules is None:
            changed["num_transformer_submodules"] = 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1
        if self.num_layers is None:
            changed["num_layers"] = self.layers_of(model, config)
        if self.num_attention_heads is None or self.token_dim is None:
            heads, width = self.shape_of(model, config)
            changed |= {"num_attention_heads": self.num_attention_heads or heads, "token_dim": self.token_dim or width}
        return self.replace(**changed)

    def layers_of(self, model: nn.Module, config: object) -> int:
        return prompt_size(self, model, config, "num_layers", "num_hidden_layers", "num_layers", "n_layer")

    def shape_of(self, model: nn.Module, config: object) -> tuple[int, int]:
        """Attention heads, and the width of a virtual token: that of the model's embeddings."""
        names = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
        heads = self.num_attention_heads or prompt_size(self, model, config, "num_attention_heads", *names)
        find = getattr(model, "get_input_embeddings", None)
        table = None if find is None else find()
        if (width := getattr(table, "embedding_dim", None)) is not None:
            return heads, int(width)
        if (weight := getattr(table, "weight", None)) is not None:
            return heads, int(weight.shape[1])
        return heads, prompt_size(self, model, config, "token_dim", "hidden_size", "n_embd", "d_model")


def sizes_of(model: nn.Module) -> Any:
    """The part of a model's config that describes its text stack."""
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


def prompt_size(method: Method, model: nn.Module, config: object, field: str, *names: str) -> int:
    """The first of several names that a model's config has.

    Raises:
        ValueError: it has none; `field` of the method's config says it then.
    """
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(
        f"{type(method).__name__}({field}=None): the config of {type(model).__name__} has none of {', '.join(names)}; "
        f"give {field}"
    )
