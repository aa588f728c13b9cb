"""The forward of a stack with virtual tokens: the one place that knows where soft prompts enter a model.

Methods return the embeddings (`prompt`), or the keys and values (`prefix`), that precede a sequence. They enter in
the forward of a *stack*: the module that takes token embeddings and returns hidden states (a decoder-only model's or an
encoder's backbone; the encoder and the decoder of an encoder-decoder). There masks, positions and the cache are extended,
and virtual positions are cut off the output again, so that no head, no loss and no caller ever sees them.

    prefix     P virtual positions with keys and values, no queries: a cache before the caller's cache
    prompt     T virtual tokens: run with the sequence, at its front. While a causal model fills a cache their keys and
               values are kept apart, and precede the cache from then on, like a prefix
    order      prefix, prompt, tokens; several adapters' one after another, in the order in which they are active
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .call_cache import CachedCall
from .masks import refuse_packed_kernels
from .positions import PositionedCall
from .stack_call import cache_length
from .stacks import CACHES, embedding_of

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class PromptedForward(CachedCall, PositionedCall):
    """One call of a stack with virtual tokens before its own."""

    def run(self) -> Any:
        door, call, front = self.door, self.call, self.front
        refuse_packed_kernels(call)
        as_tuple = call.get("return_dict") is False
        if as_tuple:
            call["return_dict"] = True  # outputs are cut by name
        cross = call.get("encoder_hidden_states") is not None
        inner = self._caller_cache(cross)
        memory = self._memory_of(inner)
        runs = front.T if memory is None else 0  # prompt tokens that run in this pass
        known = front.P + front.T - runs  # virtual positions whose keys and values exist
        past = 0 if inner is None else cache_length(inner)
        self._check_length(past)
        served = None
        if known or (inner is not None and runs):
            from . import kv_cache as kv

            pairs = self._virtual_pairs(memory)
            fill = runs if inner is not None else 0
            call[door.cache], served = kv.in_front(inner, pairs, known, fill, cross)
            served.ready = self._is_plainly_filled(memory, pairs, inner)
            if inner is None and "use_cache" in door.arguments and not self._is_checkpointed():
                call["use_cache"] = (
                    True  # some stacks hand their blocks no cache otherwise; nothing is kept all the same
                )
        self._extend_positions(runs, past, inner)
        self._extend_mask(runs, past, inner)
        if runs:
            self._put_prompt(runs)
        with self._carry_to_checkpoints(served):
            out = self.proceed((), call)
        if served is not None:
            self._check_served(served)
            if inner is not None and runs:
                self._remember(inner, served)
        out = self._cut_virtual_positions(out, runs, inner)
        return out.to_tuple() if as_tuple else out

    def _put_prompt(self, runs: int) -> None:
        call, prompt = self.call, self.front.prompt
        assert prompt is not None
        embeds = call.get("inputs_embeds")
        if embeds is None:
            table = embedding_of(self.stack)
            assert table is not None
            embeds = table(call["input_ids"])
        call["input_ids"] = None
        for name, value in call.items():
            if name in PER_TOKEN or name.startswith("encoder_") or not isinstance(value, Tensor):
                continue
            if tuple(value.shape[:2]) == (self.batch, self.tokens):
                raise ValueError(
                    f"{type(self.stack).__name__} gets {name}, something of each token that virtual tokens do not have; use "
                    "prefix tuning if the model takes a cache, or a method that adapts layers, such as LoraConfig"
                )
        # (batch, T, width) + (batch, tokens, width)
        call["inputs_embeds"] = torch.cat([prompt.to(embeds).expand(self.batch, -1, -1), embeds], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if isinstance(given := call.get(name), Tensor):
                call[name] = torch.cat([given.new_zeros(given.shape[0], runs), given], 1)

    def _cut_virtual_positions(self, out: Any, runs: int, inner: Cache | None) -> Any:
        """The output without virtual positions, and with the caller's own cache."""
        keep = not runs or self.door.role == "encoder" or self.router.whole()
        if isinstance(out, tuple):
            first = out[0] if keep or self.door.keeps_first else out[0][:, runs:]
            return (first, *(inner if _is_cache(o) else o for o in out[1:]))
        kept = {k: inner if k in CACHES[:2] else v for k, v in out.items() if k not in CACHES[:2] or inner is not None}
        out = type(out)(**kept)
        if keep:
            return out
        if "last_hidden_state" in out and not self.door.keeps_first:
            out["last_hidden_state"] = out["last_hidden_state"][:, runs:]
        for name in ("hidden_states", "attentions", "cross_attentions"):
            if out.get(name) is not None:
                axis = 1 if name == "hidden_states" else 2
                out[name] = tuple(h if h is None else h.narrow(axis, runs, h.shape[axis] - runs) for h in out[name])
        return out


def _is_cache(value: object) -> bool:
    from . import kv_cache as kv

    return kv.is_cache(value)
