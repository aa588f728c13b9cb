"""The cache of a stack's call: virtual keys and values before those of the caller's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..algebra.protocols import AutogradContext
from ..distributed import tensor_parallel
from ..injection.interceptors import CARRIED
from .stack_call import StackCall
from .stacks import embedding_of
from .virtual_tokens import join_positions

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .kv_cache import KeyValues, Memory, PrefixCache
    from .virtual_tokens import VirtualTokens


class CachedCall(StackCall):
    """A call whose cache holds the keys and values of virtual positions."""

    def _caller_cache(self, cross: bool) -> Any:
        """The caller's cache, or the one that the stack would make for itself, or None."""
        name, call = self.door.cache, self.call
        if not name:
            return None
        given = call.get(name)
        if given is not None:
            from . import kv_cache as kv

            kv.refuse_cache(given)
            return given
        wanted = call.get("use_cache")
        config = getattr(self.stack, "config", None)
        if wanted is None:
            wanted = getattr(config, "use_cache", False)
        if not wanted or not self.door.causal or self._is_checkpointed():
            return None
        from . import kv_cache as kv

        made = kv.fresh_cache(config, cross or bool(getattr(config, "is_encoder_decoder", False)))
        return None if kv.is_recurrent(made) else made

    @contextmanager
    def _carry_to_checkpoints(self, served: PrefixCache | None) -> Iterator[None]:
        """Hand the prefix to checkpointed blocks, from which transformers takes the cache away.

        A checkpointed block is called through the function that its `_gradient_checkpointing_func` is given, now and again
        in backward; the prefix is made an argument of that function.
        """
        blocks = self.door.carriers if served is not None and self._is_checkpointed() else []
        before = [block.__dict__["_gradient_checkpointing_func"] for block in blocks]
        reentrant = any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in before)
        if served is not None and reentrant:
            self._collect_gradients(served)
        try:
            for block, checkpoint in zip(blocks, before, strict=True):
                block.__dict__["_gradient_checkpointing_func"] = partial(
                    _checkpoint_with_prefix, checkpoint, self.call[self.door.cache]
                )
            yield
        finally:
            for block, checkpoint in zip(blocks, before, strict=True):
                block.__dict__["_gradient_checkpointing_func"] = checkpoint

    def _collect_gradients(self, served: PrefixCache) -> None:
        """For reentrant checkpointing, whose blocks go through backward one by one.

        Each would backpropagate through the prefix's graph again, which autograd allows once. So they get leaves, and the
        accumulated gradient goes on when the backward pass arrives at the stack's input, after the last block.
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
        self.call["inputs_embeds"] = _CollectGradients.apply(embeds, leaves, *made)  # type: ignore[no-untyped-call]

    def _memory_of(self, inner: Cache | None) -> Any:
        """What a cache keeps from when it was filled.

        Raises:
            ValueError: the cache holds tokens that were computed with other adapters in front, or with none.
        """
        if inner is None:
            return None
        memory = inner.__dict__.get("veneer")
        if memory is not None and _same_tokens(memory.key, self.front.key):
            return memory
        from . import kv_cache as kv

        if kv.holds_tokens(inner):
            then = "no soft prompt" if memory is None else "other soft prompts, or other values of them,"
            raise ValueError(
                f"the cache that was passed holds tokens computed with {then} in front, and they cannot be continued with "
                f"{[k[0] for k in self.front.key if isinstance(k[0], str)]}; pass a new cache and the whole sequence"
            )
        if not self.front.T:
            memory = kv.Memory(self.front.key, [], self._kept_tokens)
            inner.veneer = memory
            return memory
        return None

    def _remember(self, inner: Cache, served: PrefixCache) -> None:
        from . import kv_cache as kv

        front = [served.made[i] for i in range(len(served.made))]
        alone = self.call.get("encoder_hidden_states") is None  # cross-attention tells the rows' prompts apart
        if alone and self.front.prompt is not None and self.front.prompt.shape[0] == 1:  # the same in every row
            front = [(k[:1], v[:1]) for k, v in front]
        inner.veneer = kv.Memory(self.front.key, front, self._kept_tokens)

    def _is_plainly_filled(self, memory: Memory | None, pairs: KeyValues, inner: Cache | None) -> bool:
        """Whether the layers may take the prefix as it is; computed once per cache."""
        if memory is None or memory.ready is None or torch.is_grad_enabled() or memory.ready is not pairs:
            return False
        if memory.plain != self.batch:
            from . import kv_cache as kv

            memory.plain = self.batch if kv.plainly_filled(inner, pairs, self.batch) else -1
        return bool(memory.plain == self.batch and _own_layers(inner)[0].is_initialized)  # else it was reset

    @property
    def _kept_tokens(self) -> VirtualTokens | None:
        """The virtual tokens, if a later call may reuse them, else None."""
        return None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self.front

    def _virtual_pairs(self, memory: Memory | None) -> list[tuple[Tensor, Tensor]]:
        """Virtual keys and values that exist already: the prefix's, then the prompt's remembered ones."""
        kept = None if memory is None or memory.made is None or torch.is_grad_enabled() else memory
        if kept is not None and kept.ready is not None and kept.ready[0][0].shape[0] == self.batch:
            return kept.ready
        found = self._make_pairs(memory)
        if kept is not None and found:
            dtype = self._embedding_dtype()
            found = [
                (k.to(dtype).expand(self.batch, -1, -1, -1), v.to(dtype).expand(self.batch, -1, -1, -1))
                for k, v in found
            ]
            kept.ready = found
        return found

    def _make_pairs(self, memory: Memory | None) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        if self.front.prefix is not None:
            # (batch or 1, layers, 2, heads, P, head width) -> a pair (batch or 1, heads, P, head width) a layer
            prefix = tensor_parallel.own_heads(self.stack, self.front.prefix, 3)
            found = [(layer[:, 0], layer[:, 1]) for layer in prefix.unbind(1)]
        if memory is None or not memory.front:
            return found
        if not found:
            return list(memory.front)
        return [
            (join_positions(a, c), join_positions(b, d)) for (a, b), (c, d) in zip(found, memory.front, strict=True)
        ]

    def _check_served(self, served: PrefixCache) -> None:
        if not served.served:
            raise TypeError(
                f"{self.door.site.name}: no layer of {type(self.stack).__name__} asked its cache, so a prefix would have "
                "no effect; use prompt tuning or LoRA on this model"
            )


class _CollectGradients(torch.autograd.Function):
    """Identity on a stack's input; its backward returns the gradients that the blocks accumulated in `leaves`."""

    @staticmethod
    def forward(ctx: AutogradContext, embeds: Tensor, leaves: list[Tensor], *made: Tensor) -> Tensor:
        ctx.leaves = leaves
        return embeds.view_as(embeds)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Any, ...]:
        found = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad, None, *found)


def _checkpoint_with_prefix(
    checkpoint: Callable[..., Any], cache: Cache | None, block: Callable[..., Any], *args: object
) -> Any:
    """Checkpoint a block with the prefix as one of its arguments."""
    return checkpoint(partial(block, **{CARRIED: cache}), *args)


def _own_layers(cache: Cache | None) -> Any:
    from . import kv_cache as kv

    return kv.own_cache(cache).layers


def _same_tokens(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two keys name the same virtual tokens; a compiled call knows which adapter it runs, not its values."""
    if one == other:
        return True
    named = [[k if isinstance(k[0], int) else k[:2] for k in key] for key in (one, other)]
    compiled = any(isinstance(k[0], str) and not k[2] for k in (*one, *other))
    return compiled and named[0] == named[1]


def refuse_left_behind(cache: Cache | None) -> None:
    """Raise ValueError for a cache whose tokens were computed with soft prompts, if none is active now."""
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
