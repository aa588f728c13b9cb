"""Where soft prompts enter a model: the one place that knows about virtual tokens.

Methods say which embeddings (`prompt`), or which keys and values (`prefix`), stand in front of a sequence. The door is
the forward of a *stack*: the module that takes token embeddings and returns hidden states (a decoder-only model's or an
encoder's backbone; the encoder and the decoder of an encoder-decoder). There masks, positions and the cache are extended,
and virtual positions are cut off the output again, so that no head, no loss and no caller ever sees them.

    prefix     P virtual positions with keys and values, no queries: a cache in front of the caller's cache
    prompt     T virtual tokens: run with the sequence, at its front. While a causal model fills a cache their keys and
               values are set aside, and stand in front of the cache from then on, like a prefix
    order      prefix, prompt, tokens; several adapters' one after another, in the order in which they are active
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import tensor_parallel
from ..injection.dispatch import CARRIED
from .masks import like, refuse_packed_kernels
from .stacks import CACHES, embedding_of
from .virtual_tokens import glue

if TYPE_CHECKING:
    from ..injection.dispatch import AdaptedState
    from .stacks import StackFacts
    from .virtual_tokens import VirtualTokens


PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class PromptedForward:
    """One call of a stack with virtual tokens in front."""

    def __init__(
        self, door: StackFacts, state: AdaptedState, stack: nn.Module, call: dict[str, Any], front: VirtualTokens
    ) -> None:
        self.door, self.state, self.stack, self.call = door, state, stack, call
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        shown = embeds if embeds is not None else ids
        if shown is None:
            raise ValueError(f"{door.site.name}: soft prompts need input_ids or inputs_embeds, and neither was given")
        self.batch, self.tokens = int(shown.shape[0]), int(shown.shape[1])
        self.device = shown.device
        self.front = front.rows(self.batch)

    def run(self) -> Any:
        door, call, front = self.door, self.call, self.front
        refuse_packed_kernels(call)
        as_tuple = call.get("return_dict") is False
        if as_tuple:
            call["return_dict"] = True  # names tell what is to be cut
        cross = call.get("encoder_hidden_states") is not None
        inner = self.inner_cache(cross)
        memory = self.remembered(inner)
        runs = front.T if memory is None else 0  # prompt tokens that run in this pass
        known = front.P + front.T - runs  # virtual positions whose keys and values exist
        past = 0 if inner is None else length_of(inner)
        self.check_length(past)
        served = None
        if known or (inner is not None and runs):
            from . import kv_cache as kv

            pairs = self.pairs(memory)
            fill = runs if inner is not None else 0
            call[door.cache], served = kv.in_front(inner, pairs, known, fill, cross)
            served.ready = self.plain(memory, pairs, inner)
            if inner is None and "use_cache" in door.arguments and not self.checkpointed():
                call["use_cache"] = (
                    True  # some stacks hand their blocks no cache otherwise; nothing is kept all the same
                )
        self.extend_positions(runs, past, inner)
        self.extend_mask(runs, past, inner)
        if runs:
            self.put_prompt(runs)
        with self.carried(served):
            out = self.state.inner(self.stack, self.state.router.live(), (), call)
        if served is not None:
            self.check_served(served)
            if inner is not None and runs:
                self.remember(inner, served)
        out = self.cut(out, runs, inner)
        return out.to_tuple() if as_tuple else out

    # The cache.

    def inner_cache(self, cross: bool) -> Any:
        """The caller's cache, or the one that the stack would make for itself, or None."""
        name, call = self.door.cache, self.call
        if not name:
            return None
        given = call.get(name)
        if given is not None:
            from . import kv_cache as kv

            kv.refuse(given)
            return given
        wanted = call.get("use_cache")
        config = getattr(self.stack, "config", None)
        if wanted is None:
            wanted = getattr(config, "use_cache", False)
        if not wanted or not self.door.causal or self.checkpointed():
            return None
        from . import kv_cache as kv

        made = kv.fresh_cache(config, cross or bool(getattr(config, "is_encoder_decoder", False)))
        return None if kv.is_recurrent(made) else made

    def checkpointed(self) -> bool:
        """Whether the blocks are to be checkpointed in this call."""
        if not (self.stack.training and torch.is_grad_enabled()):
            return False
        return any(block.__dict__.get("gradient_checkpointing", False) for block in self.door.carriers)

    @contextmanager
    def carried(self, served: Any) -> Iterator[None]:
        """Hand the prefix to checkpointed blocks, from which transformers takes the cache away.

        A checkpointed block is called through the function that its `_gradient_checkpointing_func` is given, now and again
        in backward; the prefix is made an argument of that function.
        """
        blocks = self.door.carriers if served is not None and self.checkpointed() else []
        before = [block.__dict__["_gradient_checkpointing_func"] for block in blocks]
        if any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in before):
            self.collect(served)
        try:
            for block, checkpoint in zip(blocks, before, strict=True):
                block.__dict__["_gradient_checkpointing_func"] = partial(
                    with_prefix, checkpoint, self.call[self.door.cache]
                )
            yield
        finally:
            for block, checkpoint in zip(blocks, before, strict=True):
                block.__dict__["_gradient_checkpointing_func"] = checkpoint

    def collect(self, served: Any) -> None:
        """For reentrant checkpointing, whose blocks go through backward one by one.

        Each would go through what computed the prefix again, which autograd allows once. So they see leaves, and what has
        come together there goes on when the backward pass arrives at the stack's input, after the last block.
        """
        made = [t for pair in served.prefix for t in pair]
        if not any(t.requires_grad for t in made):
            return
        leaves = [t.detach().requires_grad_() for t in made]
        served.prefix = list(zip(leaves[::2], leaves[1::2], strict=True))
        embeds = self.call.get("inputs_embeds")
        if embeds is None:
            table = embedding_of(self.stack)
            assert table is not None
            embeds = table(self.call.pop("input_ids"))
        self.call["inputs_embeds"] = Collect.apply(embeds, leaves, *made)  # type: ignore[no-untyped-call]

    def remembered(self, inner: Any) -> Any:
        """What a cache keeps from when it was filled.

        Raises:
            ValueError: the cache holds tokens that were computed with other adapters in front, or with none.
        """
        if inner is None:
            return None
        memory = inner.__dict__.get("veneer")
        if memory is not None and same(memory.key, self.front.key):
            return memory
        from . import kv_cache as kv

        if kv.holds_tokens(inner):
            then = "no soft prompt" if memory is None else "other soft prompts, or other values of them,"
            raise ValueError(
                f"the cache that was passed holds tokens computed with {then} in front, and they cannot be continued with "
                f"{[k[0] for k in self.front.key if isinstance(k[0], str)]}; pass a new cache and the whole sequence"
            )
        if not self.front.T:
            memory = kv.Memory(self.front.key, [], self.made)
            inner.veneer = memory
            return memory
        return None

    def remember(self, inner: Any, served: Any) -> None:
        from . import kv_cache as kv

        front = [served.made[i] for i in range(len(served.made))]
        alone = self.call.get("encoder_hidden_states") is None  # cross-attention tells the rows' prompts apart
        if alone and self.front.prompt is not None and self.front.prompt.shape[0] == 1:  # the same in every row
            front = [(k[:1], v[:1]) for k, v in front]
        inner.veneer = kv.Memory(self.front.key, front, self.made)

    def plain(self, memory: Any, pairs: Any, inner: Any) -> bool:
        """Whether the layers need not look at what stands in front; found out once and kept."""
        if memory is None or memory.ready is None or torch.is_grad_enabled() or memory.ready is not pairs:
            return False
        if memory.plain != self.batch:
            from . import kv_cache as kv

            memory.plain = self.batch if kv.plainly_filled(inner, pairs, self.batch) else -1
        return bool(memory.plain == self.batch and own_layers(inner)[0].is_initialized)  # else it was reset

    @property
    def made(self) -> VirtualTokens | None:
        """The virtual tokens, where a later call can have them again."""
        return None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self.front

    def pairs(self, memory: Any) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that stand in front already: the prefix's, then those remembered of the prompt."""
        keep = memory is not None and memory.made is not None and not torch.is_grad_enabled()
        if keep and memory.ready is not None and memory.ready[0][0].shape[0] == self.batch:
            return memory.ready  # type: ignore[no-any-return]
        found = self.pairs_made(memory)
        if keep and found:
            dtype = self.site_dtype()
            found = [
                (k.to(dtype).expand(self.batch, -1, -1, -1), v.to(dtype).expand(self.batch, -1, -1, -1))
                for k, v in found
            ]
            memory.ready = found
        return found

    def pairs_made(self, memory: Any) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        if self.front.prefix is not None:
            # (batch or 1, layers, 2, heads, P, head width) -> a pair (batch or 1, heads, P, head width) a layer
            prefix = tensor_parallel.own_heads(self.stack, self.front.prefix, 3)
            found = [(layer[:, 0], layer[:, 1]) for layer in prefix.unbind(1)]
        if memory is None or not memory.front:
            return found
        if not found:
            return list(memory.front)
        return [(glue(a, c), glue(b, d)) for (a, b), (c, d) in zip(found, memory.front, strict=True)]

    def check_served(self, served: Any) -> None:
        if not served.served:
            raise TypeError(
                f"{self.door.site.name}: no layer of {type(self.stack).__name__} asked its cache, so a prefix would have "
                "no effect; use prompt tuning or LoRA on this model"
            )

    # Positions and masks.

    def extend_positions(self, runs: int, past: Any, inner: Any) -> None:
        """Count the virtual positions in position_ids, and make them where the rows differ."""
        call, front = self.call, self.front
        given = call.get("position_ids")
        takes = "position_ids" in self.door.arguments
        if given is None and front.counts is not None:
            if not takes:
                raise ValueError(
                    f"{type(self.stack).__name__} takes no position_ids, so soft prompts of different lengths cannot "
                    "share a batch on it; give them the same num_virtual_tokens, or run the rows one adapter at a time"
                )
            given = self.positions_of_tokens(past)
        if given is None:
            return
        if inner is None and call.get("attention_mask") is None and self.door.causal:
            self.packed(given)
        moved = given + front.offset(self.device)
        if runs:
            steps = front.prompt_positions(moved.shape[-2] if moved.ndim > 1 else 1, self.device).to(moved.dtype)
            steps = steps if self.door.table is None else steps + self.door.table.first
            moved = torch.cat([steps.expand(*moved.shape[:-1], -1) if moved.ndim > 1 else steps[0], moved], -1)
        call["position_ids"] = moved

    def positions_of_tokens(self, past: Any) -> Tensor:
        """Positions of the real tokens as the model counts them, (1 or batch, tokens)."""
        mask, table = self.call.get("attention_mask"), self.door.table
        if table is not None and table.by_mask and isinstance(mask, Tensor) and mask.ndim == 2:
            counted: Tensor = (mask.long().cumsum(1) - 1).clamp_min(0) + table.first
            return counted[:, -self.tokens :]
        steps: Tensor = torch.arange(self.tokens, device=self.device) + past
        return steps[None] + (0 if table is None else table.first)

    def packed(self, positions: Tensor) -> None:
        """Several sequences in a row, told by positions that start again: each sees the virtual tokens and itself."""
        positions = positions.reshape(-1, positions.shape[-1])
        starts = positions[:, 1:] != positions[:, :-1] + 1  # (rows, tokens - 1)
        if not torch.compiler.is_compiling() and not bool(starts.any()):  # a graph has the mask in any case
            return
        number = nn.functional.pad(starts.long().cumsum(1), (1, 0))  # (rows, tokens)
        same = number[:, :, None] == number[:, None, :]  # (rows, tokens, tokens)
        causal = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=self.device).tril()
        self.call["attention_mask"] = self.as_wanted((same & causal)[:, None].expand(self.batch, -1, -1, -1))

    def as_wanted(self, seen: Tensor) -> Tensor:
        """A bool mask (batch, 1, queries, keys) in the form that the attention implementation adds or reads."""
        how = getattr(getattr(self.stack, "config", None), "_attn_implementation", "eager")
        if how == "sdpa":
            return seen
        if how != "eager":
            raise ValueError(
                f"packed sequences with a soft prompt need a 4-D mask, which {how!r} attention does not take; load the "
                "model with attn_implementation='sdpa', or do not pack"
            )
        dtype = self.site_dtype()
        zero = torch.zeros((), dtype=dtype, device=seen.device)
        return torch.where(seen, zero, torch.finfo(dtype).min)

    def site_dtype(self) -> torch.dtype:
        embeds: Tensor | None = self.call.get("inputs_embeds")
        return self.door.site.reference.dtype if embeds is None else embeds.dtype

    def extend_mask(self, runs: int, past: Any, inner: Any) -> None:
        """Let the tokens see the virtual positions: 2-D, 4-D and by kind of layer, or no mask at all."""
        mask, front = self.call.get("attention_mask"), self.front
        shown = front.mask(self.batch, self.device)  # (batch, P + T)
        if mask is None:
            if front.counts is None and (self.door.causal or not front.P):
                return
            mask = torch.ones(self.batch, self.tokens + past, dtype=torch.long, device=self.device)
        if isinstance(mask, Mapping):
            self.call["attention_mask"] = {k: self.wider(m, shown, runs, k, past, inner) for k, m in mask.items()}
        else:
            self.call["attention_mask"] = self.wider(mask, shown, runs, "", past, inner)

    def wider(self, mask: Any, shown: Tensor, runs: int, layers: str, past: Any, inner: Any) -> Any:
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"attention_mask is a {type(mask).__name__}, which cannot be extended by virtual tokens; pass a 2-D mask "
                "(batch, tokens) or a 4-D tensor (batch, 1, queries, keys)"
            )
        if mask.ndim == 2:
            return torch.cat([shown.to(mask.dtype), mask], 1)
        if mask.ndim != 4:
            raise ValueError(
                f"attention_mask has {mask.ndim} dimensions; pass (batch, tokens) or (batch, 1, queries, keys)"
            )
        seen = shown[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)  # (batch, heads, queries, P + T)
        window = getattr(getattr(self.stack, "config", None), "sliding_window", None)
        if "sliding" in layers and window:
            offset = 0 if inner is None else sliding_offset(inner)
            if offset > 0:
                return mask  # the window has moved past the virtual positions
            query = torch.arange(mask.shape[2], device=self.device) + past + shown.shape[1]
            near = torch.arange(shown.shape[1], device=self.device)[None] > query[:, None] - window
            seen = seen & near
        full = torch.cat([like(seen, mask), mask], -1)
        if not runs or (mask.shape[2] == 1 and not self.door.causal):
            return full
        return torch.cat([self.prompt_rows(full, shown, runs), full], 2)

    def prompt_rows(self, full: Tensor, shown: Tensor, runs: int) -> Tensor:
        """What the prompt's own tokens see, (batch, heads, T, keys) in the form of `full`."""
        keys, start = full.shape[-1], shown.shape[1] - runs
        rows = torch.zeros(self.batch, full.shape[1], runs, keys, dtype=torch.bool, device=self.device)
        if self.door.causal:
            before = torch.ones(runs, shown.shape[1], dtype=torch.bool, device=self.device).tril(start)
            rows[..., : shown.shape[1]] = before & shown[:, None, None]
        else:
            visible = full if full.dtype == torch.bool else full > torch.finfo(full.dtype).min / 2
            rows[:] = visible.any(2, keepdim=True)
        return like(rows, full)

    def check_length(self, past: Any) -> None:
        most = self.door.positions
        if most is None or isinstance(past, Tensor):
            return
        virtual = self.front.P + self.front.T
        if virtual + past + self.tokens > most:
            raise ValueError(
                f"{virtual} virtual tokens and {past + self.tokens} tokens are more than the {most} positions of "
                f"{type(self.stack).__name__}; shorten the input to {max(most - virtual, 0)} tokens, or use fewer "
                "virtual tokens"
            )

    # Embeddings in, hidden states out.

    def put_prompt(self, runs: int) -> None:
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
                    "prefix tuning where the model takes a cache, or a method that adapts layers, such as LoraConfig"
                )
        # (batch, T, width) + (batch, tokens, width)
        call["inputs_embeds"] = torch.cat([prompt.to(embeds).expand(self.batch, -1, -1), embeds], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if isinstance(given := call.get(name), Tensor):
                call[name] = torch.cat([given.new_zeros(given.shape[0], runs), given], 1)

    def cut(self, out: Any, runs: int, inner: Any) -> Any:
        """The output without virtual positions, and with the caller's own cache."""
        keep = not runs or self.door.role == "encoder" or self.state.router.whole()
        if isinstance(out, tuple):
            first = out[0] if keep or self.door.keeps_first else out[0][:, runs:]
            return (first, *(inner if is_cache(o) else o for o in out[1:]))
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


class Collect(torch.autograd.Function):
    """Passes a stack's input through; in backward, hands on the gradients that its blocks left at `leaves`."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, leaves: list[Tensor], *made: Tensor) -> Tensor:
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad, None, *found)


def with_prefix(checkpoint: Callable[..., Any], cache: Any, block: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a block with the prefix as one of its arguments."""
    return checkpoint(partial(block, **{CARRIED: cache}), *args)


def own_layers(cache: Any) -> Any:
    from . import kv_cache as kv

    return kv.own_cache(cache).layers


def length_of(cache: Any) -> Any:
    from . import kv_cache as kv

    own = kv.own_cache(cache)
    return own.get_seq_length() if len(own.layers) else 0


def sliding_offset(cache: Any) -> int:
    """How far the window of a cache's sliding layers has moved."""
    from . import kv_cache as kv

    own = kv.own_cache(cache)
    at = next((i for i, sliding in enumerate(own.is_sliding) if sliding), 0)
    return int(own.get_mask_sizes(1, at)[1])


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two keys name the same virtual tokens; a compiled call knows which adapter it runs, not its values."""
    if one == other:
        return True
    named = [[k if isinstance(k[0], int) else k[:2] for k in key] for key in (one, other)]
    compiled = any(isinstance(k[0], str) and not k[2] for k in (*one, *other))
    return compiled and named[0] == named[1]


def refuse_left_behind(cache: Any) -> None:
    """Raise ValueError for a cache whose tokens were computed with soft prompts in front, where there are none now."""
    if cache is None or "veneer" not in getattr(cache, "__dict__", {}):
        return
    from . import kv_cache as kv

    if kv.holds_tokens(cache):
        names = [k[0] for k in cache.veneer.key if isinstance(k[0], str)]
        raise ValueError(
            f"the cache that was passed holds tokens computed with the soft prompts {names} in front, and none is active "
            "now; pass a new cache and the whole sequence"
        )
    del cache.veneer  # it was reset, and is filled without


def is_cache(value: Any) -> bool:
    from . import kv_cache as kv

    return kv.is_cache(value)
