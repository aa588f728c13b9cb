"""The transformer stacks of a model and the entry of virtual tokens into them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..injection.entries import AdaptedSite

CACHES = ("cache", "past_key_values", "layer_past", "past_key_value")  # argument names of the cache


@dataclass(frozen=True)
class Positions:
    """A table of learned absolute positions.

    Attributes:
        count: positions that tokens can have.
        first: the position of a sequence's first token.
        by_mask: whether the model counts tokens that are not padding, and not steps.
    """

    count: int
    first: int
    by_mask: bool


@dataclass
class StackFacts:
    """Forward signature, cache argument and position table of one stack, read from it once.

    Attributes:
        site: the place, holding the adapters' tensors.
        role: "model", "encoder" or "decoder".
        arguments: names of the forward's arguments.
        cache: which of them is the cache, or "".
        causal: whether a token attends to earlier tokens only.
        table: its table of learned positions, or None.
        keeps_first: whether the head reads the first position, which then is the first virtual one, as in peft.
        carriers: the blocks, which get the prefix also if checkpointing drops their cache argument.
        encoder: the door of the encoder, of which this is the decoder.
    """

    site: AdaptedSite
    role: str
    arguments: tuple[str, ...]
    cache: str
    causal: bool
    table: Positions | None
    keeps_first: bool
    carriers: list[nn.Module] = field(default_factory=list)
    encoder: Any = None

    @property
    def positions(self) -> int | None:
        """Most positions that a table of learned positions has, or None."""
        return None if self.table is None else self.table.count


def find_stacks(model: nn.Module) -> dict[str, str]:
    """Role -> name of the stacks into which virtual tokens can go.

    Raises:
        ValueError: the model takes no token embeddings.
    """
    names = {id(m): n for n, m in model.named_modules()}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        found = {"encoder": _call_if_present(model, "get_encoder"), "decoder": _call_if_present(model, "get_decoder")}
        found = {r: getattr(m, "base_model", m) for r, m in found.items()}  # below a language model's head
        chosen = {r: names[id(m)] for r, m in found.items() if takes_embeddings(m) and id(m) in names}
        if len(chosen) == 2:
            return chosen
        for name in chosen.values():  # the other takes sounds or pictures
            return {"model": name}
    candidates = (_call_if_present(model, "get_decoder"), getattr(model, "base_model", None), model)
    for module in candidates:
        if takes_embeddings(module) and embedding_of(module) is not None and id(module) in names:
            return {"model": names[id(module)]}
    raise ValueError(
        f"{type(model).__name__} has no module that takes inputs_embeds, so no virtual token can enter it; use a method "
        "that adapts layers, such as LoraConfig"
    )


def _call_if_present(model: nn.Module, name: str) -> Any:
    found = getattr(model, name, None)
    return None if found is None else found()


def takes_embeddings(module: object) -> bool:
    return isinstance(module, nn.Module) and "inputs_embeds" in inspect.signature(module.forward).parameters


def embedding_of(stack: object) -> nn.Module | None:
    """The embedding of a stack's tokens, or None."""
    find = getattr(stack, "get_input_embeddings", None)
    if find is None:
        return None
    try:
        table = find()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Module) and isinstance(getattr(table, "weight", None), Tensor) else None


def base_type_name(model: nn.Module) -> str:
    return getattr(type(model), "_veneer_base", type(model)).__name__


def checkpointable_blocks(stack: nn.Module) -> Iterator[nn.Module]:
    """The modules of a stack that can be checkpointed and take a cache."""
    for module in stack.modules():
        kinds = {c.__name__ for c in type(module).__mro__}
        if "GradientCheckpointingLayer" in kinds and cache_argument(module) is not None:
            yield module


def cache_argument(module: nn.Module) -> tuple[str, int] | None:
    """Name and place of the cache among the arguments of a block's forward, or None."""
    names = list(inspect.signature(module.forward).parameters)
    return next(((a, names.index(a)) for a in CACHES if a in names), None)


def learned_positions(stack: nn.Module) -> Positions | None:
    """The table of learned absolute positions, without the rows that no position uses, or None."""
    for name, module in stack.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf) and "bias" not in leaf:
            unused = getattr(module, "offset", 0)
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            by_mask = padding > 0 or "attention_mask" in inspect.signature(module.forward).parameters
            return Positions(module.num_embeddings - max(unused, padding), padding, by_mask)
    return None


def keeps_recurrent_states(config: object) -> bool:
    """Whether some layers of a stack keep recurrent states instead of keys and values."""
    if not callable(getattr(config, "get_text_config", None)):
        return False
    from . import kv_cache as kv

    return kv.is_recurrent(kv.fresh_cache(config, False))
