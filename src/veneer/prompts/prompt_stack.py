"""A stack as the place of virtual tokens: its layer kind, its forward with virtual tokens, attaching and restoring it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..distributed.sharding import shape_of
from ..injection.class_swap import adapt_carrier, adapt_class, restore_class
from ..injection.dispatch import state_of
from ..injection.entries import AdaptedSite
from ..injection.interceptors import Args, Call, CarriedPrefix, Interceptor, Kwargs, Proceed
from ..injection.router import Router, adapter_names
from ..layers.geometry import Geometry
from ..layers.kind import LayerKind
from .call_cache import refuse_left_behind
from .forward import PromptedForward
from .masks import extend_cross
from .stacks import (
    CACHES,
    StackFacts,
    base_type_name,
    cache_argument,
    checkpointable_blocks,
    embedding_of,
    keeps_recurrent_states,
    learned_positions,
)
from .virtual_tokens import VirtualTokens

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class PromptStackKind(LayerKind):
    """A stack of blocks, seen as a place for virtual tokens: (vocabulary, width) of its embedding."""

    name = "stack"
    param = ""

    def matches(self, module: nn.Module) -> bool:
        return False  # methods that bring virtual tokens name it

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        table = embedding_of(owner)
        if table is None:
            return Geometry(0, 0)
        rows, width = shape_of(cast(Tensor, table.weight))
        return Geometry(rows, width, lookup=True)


PROMPT_STACK = PromptStackKind()


class PromptStack(StackFacts, Interceptor):
    """A stack whose forward takes the virtual tokens of adapters."""

    order = 40
    encoder: PromptStack | None

    @property
    def sites(self) -> list[AdaptedSite]:
        return [self.site]

    def run(self, call: Call, args: Args, kwargs: Kwargs, proceed: Proceed) -> Any:
        """The stack's forward with the virtual tokens of the adapters that are live."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        if self.cache == "cache" and "past_key_values" in given:  # transformers' name for it until 5.23
            given["cache"] = given.pop("past_key_values")
        router = call.router
        here = self.known(router, given.get(self.cache)) or self.front(router)
        behind = None if self.encoder is None else self.encoder.front(router)
        if behind is not None and given.get("encoder_hidden_states") is not None:
            extend_cross(given, behind)
        if here is None:
            refuse_left_behind(given.get(self.cache))
            return proceed((), given)
        return PromptedForward(self, call, given, here, proceed).run()

    def known(self, router: Router, cache: Cache | None) -> VirtualTokens | None:
        """What the caller's cache keeps of an earlier call with the same virtual tokens, or None."""
        memory = None if cache is None or torch.is_grad_enabled() else getattr(cache, "veneer", None)
        if memory is None or memory.made is None or torch.compiler.is_compiling():
            return None
        live = router.rows() or tuple(adapter_names(router.live()))
        names = [n for n in dict.fromkeys(live) if n in self.site.entries]
        key = tuple(self.key_of(n, self.site.tensors(n), router) for n in names)
        if router.rows() is not None:
            order = list(dict.fromkeys(live))
            key = (tuple(order.index(n) for n in live), *key)
        made: VirtualTokens = memory.made
        return made if made.key == key else None

    def key_of(self, name: str, p: Mapping[str, Tensor], router: Router) -> tuple[Any, ...]:
        """What an adapter's virtual tokens are made from: it, the state of its tensors, and the rows' tasks."""
        serial, tasks = self.site.entries[name].serial, router.tasks()
        if torch.compiler.is_compiling():
            return (name, serial, (), ())
        versions = tuple(0 if t.is_inference() else t._version for t in p.values())
        return (name, serial, versions, () if tasks is None else tuple(tasks.tolist()))

    def front(self, router: Router) -> VirtualTokens | None:
        """The virtual tokens that stand before this call's rows, or None."""
        rows = router.rows()
        if rows is None:
            found = [self.piece(name, router) for name in adapter_names(router.live()) if name in self.site.entries]
            return VirtualTokens.joined([f for f in found if f is not None])
        names = list(dict.fromkeys(rows))
        pieces = [self.piece(n, router) if n in self.site.entries else None for n in names]
        return VirtualTokens.mixed(pieces, [names.index(n) for n in rows])

    def piece(self, name: str, router: Router) -> VirtualTokens | None:
        """One adapter's virtual tokens at this stack, before they are cast and spread over the rows."""
        entry = self.site.entries[name]
        method, p = entry.method, self.site.tensors(name)
        prefix = method.prefix(p, self.site) if "prefix" in method.hooks else None
        prompt = method.prompt(p, self.site, router.tasks()) if "prompt" in method.hooks else None
        if prefix is None and prompt is None:
            return None
        # (layers, 2, heads, P, head width) -> (1, layers, 2, heads, P, head width); (T, width) -> (1, T, width)
        prefix = None if prefix is None else prefix[None]
        prompt = prompt[None] if prompt is not None and prompt.ndim == 2 else prompt
        return VirtualTokens(prefix, prompt, None, (self.key_of(name, p, router),))


def inspect_stack(site: AdaptedSite, role: str, model: nn.Module) -> PromptStack:
    """What there is to know of a stack, read from it once."""
    stack = site.owner
    arguments = tuple(inspect.signature(stack.forward).parameters)
    own = [m for m in stack.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    pooled = getattr(stack, "pooler", None) is not None
    mean = getattr(getattr(model, "config", None), "classifier_pooling", None) in ("mean", "late")
    whole_sequence = base_type_name(model).endswith(("ForSequenceClassification", "ForMultipleChoice"))
    causal = role != "encoder" and (not own or any(m.is_causal for m in own))
    return PromptStack(
        site,
        role,
        arguments,
        next((a for a in CACHES if a in arguments), ""),
        causal,
        learned_positions(stack),
        keeps_first=whole_sequence and not causal and not pooled and not mean and role == "model",
        carriers=list(checkpointable_blocks(stack)),
    )


def attach_stack(door: PromptStack, router: Router) -> None:
    """Take over the stack, and the blocks that carry its prefix."""
    adapt_class(door.site.owner, router).insert(door)
    for block in door.carriers:
        adapt_carrier(block, router, *cache_argument(block))  # type: ignore[misc]


def link_encoder(sites: Iterable[AdaptedSite]) -> None:
    """Let the decoder's door know the encoder's."""
    states = [state_of(s.owner) for s in sites if isinstance(s.kind, PromptStackKind)]
    opened = [None if state is None else state.find(PromptStack) for state in states]
    by_role = {d.role: d for d in opened if d is not None}
    for found in by_role.values():
        found.encoder = by_role.get("encoder") if found.role == "decoder" else None


def detach_stack(door: PromptStack) -> None:
    """Undo `attach_stack`; blocks that hold nothing else are restored."""
    for module, kind in ((door.site.owner, PromptStack), *((block, CarriedPrefix) for block in door.carriers)):
        state = state_of(module)
        assert state is not None
        state.remove(kind)
        if not state.in_use and module is not door.site.owner:
            restore_class(module)


def check_stack_fits(door: PromptStack, virtual: int, prefix: bool) -> None:
    """Raise if a stack has no place for virtual tokens.

    Raises:
        ValueError: they leave no position for a real one.
        TypeError: a prefix needs the stack's cache, and it takes none.
    """
    config = getattr(door.site.owner, "config", None)
    if not prefix and "per_layer_inputs" in door.arguments and getattr(config, "hidden_size_per_layer_input", None):
        raise TypeError(
            f"{base_type_name(door.site.owner)} reads the ids of its tokens in every layer, and virtual tokens have none; use "
            "PrefixTuningConfig or LoraConfig"
        )
    if prefix and door.cache and keeps_recurrent_states(config):
        raise TypeError(
            f"{base_type_name(door.site.owner)} has layers with recurrent states (linear attention), which have no keys and values "
            "for a prefix to extend; use PromptTuningConfig or LoraConfig"
        )
    if prefix and not door.cache:
        raise TypeError(
            f"{base_type_name(door.site.owner)} takes no cache, which a prefix needs; use PromptTuningConfig or LoraConfig"
        )
    if door.positions is not None and virtual >= door.positions:
        raise ValueError(
            f"num_virtual_tokens={virtual}: {base_type_name(door.site.owner)} has {door.positions} positions, so no room is left "
            f"for real tokens; use {door.positions // 2} or fewer"
        )
