"""Virtual keys and values before those of a transformers cache.

A model sees one cache whose first positions are virtual, and builds masks and positions from it as it does from any
other. The caller's own cache, wrapped by it, holds real tokens only, so what `generate` does to a cache (reordering,
cropping, fixed sizes, chunks) stays right. Imported on use: it imports transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

KeyValues = Sequence[tuple[Tensor, Tensor]]  # a layer: keys and values, each (batch or 1, heads, length, head width)


@dataclass
class Memory:
    """What was computed for a prompt when a cache was first filled, kept on that cache.

    Attributes:
        key: which adapters, for which rows, from which values.
        front: keys and values of the prompt's tokens, a pair a layer; empty if there was no prompt.
        made: the virtual tokens, so that a later call need not compute them again; None if gradients are enabled.
        ready: all virtual keys and values, a pair (batch, heads, length, head width) a layer, under the same condition.
    """

    key: tuple[Any, ...]
    front: list[tuple[Tensor, Tensor]]
    made: Any = None
    ready: list[tuple[Tensor, Tensor]] | None = None
    plain: int = -1  # the batch for which every layer takes `ready` as it is


class PrefixCache(Cache):
    """A cache that begins with virtual positions.

    Args:
        inner: the cache of the real tokens, or None if nothing is cached (training, encoders).
        prefix: keys and values of the first `length` positions, a pair a layer.
        length: number of virtual positions that have keys and values already.
        fill: so many of the tokens of this forward are virtual as well; their keys and values are kept in `made`.
    """

    def __init__(self, inner: Cache | None, prefix: KeyValues, length: int, fill: int = 0) -> None:
        self.inner, self.prefix, self.length, self.fill = inner, prefix, length, fill
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.ready = False  # whether the prefix fits the batch and the layers as it is, seen in an earlier call
        self.served: set[int] = set()  # layers that asked

    @property
    def layers(self) -> Any:
        return [] if self.inner is None else self.inner.layers

    @property
    def offloading(self) -> bool:
        return False if self.inner is None else bool(self.inner.offloading)

    @property
    def front(self) -> int:
        """Virtual positions before the first real token."""
        return self.length + self.fill

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Take the new keys and values (batch, heads, tokens, width) of a layer; return all that it attends to."""
        self.served.add(layer_idx)
        if self.ready:  # the way of every new token: one copy, nothing asked twice
            grown = self.inner.layers[layer_idx]  # type: ignore[union-attr]
            front_keys, front_values = self.prefix[layer_idx]
            all_keys = torch.cat((front_keys, grown.keys, key_states), -2)
            all_values = torch.cat((front_values, grown.values, value_states), -2)
            own = all_keys.shape[-2] - self.length
            grown.keys, grown.values = all_keys.narrow(2, self.length, own), all_values.narrow(2, self.length, own)
            return all_keys, all_values
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self.length:
            if layer_idx >= len(self.prefix):
                raise ValueError(
                    f"the prefix has keys and values for {len(self.prefix)} layers, and layer {layer_idx} asks for "
                    "its own; set num_layers in the config to the number of the model's layers"
                )
            for found, made, states in zip(
                self.prefix[layer_idx], (keys, values), (key_states, value_states), strict=True
            ):
                if (found.shape[1], found.shape[3]) != (states.shape[1], states.shape[3]):
                    raise ValueError(
                        f"layer {layer_idx} has {states.shape[1]} key-value heads of width {states.shape[3]}, the prefix "
                        f"{found.shape[1]} of width {found.shape[3]}; set num_attention_heads and token_dim (heads times "
                        "width) in the config"
                    )
                if found.dtype != states.dtype or found.device != states.device:
                    found = found.to(states)
                made.append(found if found.shape[0] == states.shape[0] else found.expand(states.shape[0], -1, -1, -1))
        if self.fill:
            self.made[layer_idx] = (key_states[:, :, : self.fill], value_states[:, :, : self.fill])
            keys.append(key_states[:, :, : self.fill])
            values.append(value_states[:, :, : self.fill])
            key_states, value_states = key_states[:, :, self.fill :], value_states[:, :, self.fill :]
        if self.inner is None:
            return torch.cat([*keys, key_states], -2), torch.cat([*values, value_states], -2)
        layer: Any = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if type(layer) is DynamicLayer and not self.offloading:  # one copy, not two
            if not layer.is_initialized:
                layer.lazy_initialization(key_states, value_states)
            kept = (layer.keys, layer.values) if layer.keys.numel() else (key_states[:, :, :0], value_states[:, :, :0])
            all_keys = torch.cat([*keys, kept[0], key_states], -2)
            all_values = torch.cat([*values, kept[1], value_states], -2)
            own = all_keys.shape[-2] - self.front
            layer.keys, layer.values = all_keys.narrow(2, self.front, own), all_values.narrow(2, self.front, own)
            return all_keys, all_values
        hidden = self.hidden(key_states.shape[-2], layer_idx)  # asked before the inner cache grows
        own_keys, own_values = self.inner.update(key_states, value_states, layer_idx, *args, **kwargs)
        if hidden:
            return own_keys, own_values
        return torch.cat([*keys, own_keys], -2), torch.cat([*values, own_values], -2)

    def hidden(self, tokens: int, layer_idx: int) -> bool:
        """Whether a sliding window has moved past the virtual positions of a layer."""
        assert self.inner is not None
        return bool(self.inner.get_mask_sizes(tokens, layer_idx)[1] > 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.inner is None:
            return self.length + query_length, 0
        length, offset = self.inner.get_mask_sizes(query_length - self.fill, layer_idx)
        if offset > 0:
            return length, offset + self.front
        return self.front + length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        own = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return self.length + own  # a new tensor, as the inner cache increments its own in place

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        most = -1 if self.inner is None else self.inner.get_max_length(layer_idx)
        return most if most < 0 else self.front + most


class PassingCache(Cache):
    """Caches nothing: for cross-attention in training."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class Never(dict[int, bool]):
    """Flags that stay unset: a layer's cross-attention is computed on every call."""

    def __setitem__(self, key: int, value: bool) -> None:
        pass


def is_cache(value: object) -> bool:
    return isinstance(value, Cache)


def own_cache(cache: Cache) -> Cache:
    """The cache of a decoder's own tokens: the self-attention part of an encoder-decoder's."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def fresh_cache(config: object, cross: bool) -> Cache:
    """The cache that a decoder makes for itself when it is given none."""
    if cross:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def plainly_filled(cache: Cache, front: KeyValues, batch: int) -> bool:
    """Whether every layer is a plain growing cache whose virtual part can be used as it is."""
    own = own_cache(cache)
    return (
        len(own.layers) == len(front)
        and not own.offloading
        and all(
            type(layer) is DynamicLayer
            and layer.is_initialized
            and layer.keys.shape[:2] == k.shape[:2]
            and layer.keys.shape[0] == batch
            and layer.keys.dtype == k.dtype
            and layer.keys.device == k.device
            for layer, (k, _) in zip(own.layers, front, strict=True)
        )
    )


def in_front(inner: Cache | None, prefix: KeyValues, length: int, fill: int, cross: bool) -> tuple[Cache, PrefixCache]:
    """What to hand to the model, and the cache in it that holds the virtual positions."""
    if isinstance(inner, EncoderDecoderCache):
        made = PrefixCache(inner.self_attention_cache, prefix, length, fill)
        whole = EncoderDecoderCache(made, inner.cross_attention_cache)
        whole.is_updated = inner.is_updated
        return whole, made
    made = PrefixCache(inner, prefix, length, fill)
    if not cross:
        return made, made
    whole = EncoderDecoderCache(made, PassingCache())
    whole.is_updated = Never()
    return whole, made


def holds_tokens(cache: Cache) -> bool:
    """Whether a cache has been filled. Its length is only read if that needs no synchronisation."""
    own = own_cache(cache)
    layers = [x for x, empty in zip(own.layers, own.is_dummy, strict=True) if x.is_initialized and not empty]
    if not layers:
        return False
    length = layers[0].get_seq_length()
    return bool(length > 0)


def is_recurrent(cache: Cache) -> bool:
    """Whether some layers of a cache hold recurrent states."""
    own = own_cache(cache)
    return any(own.is_linear) or any(hasattr(layer, "conv_states") for layer in own.layers)


def refuse_cache(cache: Cache | None) -> None:
    """Raise for caches that no virtual token can precede.

    Raises:
        TypeError: no Cache object, or one with recurrent states.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"soft prompts: cache is a {type(cache).__name__}; pass a transformers Cache object such as DynamicCache()"
        )
    if is_recurrent(cache):
        raise TypeError(
            f"soft prompts: {type(cache).__name__} holds recurrent states (linear attention), which have no positions "
            "for virtual tokens to precede; call with use_cache=False, or adapt this model with LoRA"
        )
