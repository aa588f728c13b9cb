"""One call of a stack with virtual tokens: its arguments, batch size and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from ..injection.interceptors import Call, Proceed
    from .stacks import StackFacts
    from .virtual_tokens import VirtualTokens


class StackCall:
    """The arguments of one call of a stack, by name, and the virtual tokens of its rows."""

    def __init__(
        self, door: StackFacts, made: Call, call: dict[str, Any], front: VirtualTokens, proceed: Proceed
    ) -> None:
        self.door, self.stack, self.call = door, made.layer, call
        self.router, self.proceed = made.router, proceed
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        shown = embeds if embeds is not None else ids
        if shown is None:
            raise ValueError(f"{door.site.name}: soft prompts need input_ids or inputs_embeds, and neither was given")
        self.batch, self.tokens = int(shown.shape[0]), int(shown.shape[1])
        self.device = shown.device
        self.front = front.rows(self.batch)

    def _is_checkpointed(self) -> bool:
        """Whether the blocks are to be checkpointed in this call."""
        if not (self.stack.training and torch.is_grad_enabled()):
            return False
        return any(block.__dict__.get("gradient_checkpointing", False) for block in self.door.carriers)

    def _embedding_dtype(self) -> torch.dtype:
        embeds: Tensor | None = self.call.get("inputs_embeds")
        return self.door.site.reference.dtype if embeds is None else embeds.dtype


def cache_length(cache: Cache | None) -> Any:
    from . import kv_cache as kv

    own = kv.own_cache(cache)
    return own.get_seq_length() if len(own.layers) else 0
