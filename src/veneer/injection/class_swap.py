"""Swapping the class of a layer, and restoring it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..distributed import tensor_parallel
from .dispatch import AdaptedState
from .interceptors import CarriedPrefix

if TYPE_CHECKING:
    from .router import Router


class Adapted:
    """Mixin of the generated classes; also how to recognise an adapted layer."""

    forward: Callable[..., Any]  # of each generated class, with the signature of its base

    _veneer_base: type[nn.Module]

    def __reduce_ex__(self, protocol: object) -> Any:
        return _rebuild, (self._veneer_base, "__getattr__" in vars(type(self))), self.__dict__


def _rebuild(base: type[nn.Module], read: bool = False) -> nn.Module:
    cls = adapted_class(base, read)
    module: nn.Module = cls.__new__(cls)
    return module


_CLASSES: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module], read: bool = False) -> type[nn.Module]:
    """The subclass of `base` that runs adapters, one per base class.

    Args:
        base: the layer's own class.
        read: the layer's tensors are what its active adapters make of them also where others read them, instead of
            calling the layer: losses that are computed from `lm_head.weight`.
    """
    cls = _CLASSES.get((base, read))
    if cls is None:

        def forward(self: nn.Module, *args: object, **kwargs: object) -> Any:
            state: AdaptedState = self.__dict__["_veneer"]
            return state.run(self, args, kwargs)

        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]  # others read arguments off it

        def extra_repr(self: nn.Module) -> str:
            state = self.__dict__.get("_veneer")
            adapters = "" if state is None else state.describe_adapters()
            own = base.extra_repr(self)
            return f"{own}{', ' if own else ''}adapters: {adapters}" if adapters else own

        body = {
            "_veneer_base": base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "forward": forward,
            "extra_repr": extra_repr,
        }
        if read:

            def look_up(self: nn.Module, name: str) -> Any:
                state = self.__dict__.get("_veneer")
                found = None if state is None or name not in self._parameters else state.read(self, name)
                return base.__getattr__(self, name) if found is None else found

            body["__getattr__"] = look_up  # parameters are found there, as no module has them in its `__dict__`
        cls = type(base.__name__, (base, Adapted), body)  # base first: a class with bases of its own keeps its layout
        cls.__qualname__ = base.__qualname__
        _CLASSES[base, read] = cls
    return cls


def adapt_class(layer: nn.Module, router: Router) -> AdaptedState:
    """Swap the layer's class, keeping a forward that others put on the instance.

    accelerate's dispatch shadows the class with an instance-level `forward` that calls `_old_forward`; left
    alone, the base layer would silently run without its adapters.
    """
    state = layer.__dict__.get("_veneer")
    if isinstance(state, AdaptedState):
        return state
    state = AdaptedState(layer, router)
    own = layer.__dict__.get("forward")
    split = tensor_parallel.style_of(layer)
    if split is not None:
        state.split = split
        layer.__dict__["_veneer"] = state
        layer.__class__ = adapted_class(state.base)
        tensor_parallel.put_around(layer, *split)
        return state
    if own is not None and "_old_forward" not in layer.__dict__:
        if not isinstance(own, types.MethodType):
            raise TypeError(
                f"{type(layer).__name__}: its `forward` was replaced on the instance by {own!r}, which is not a "
                "method, so an adapter cannot run inside it; attach the adapter first, then replace forward"
            )
        state.instance_forward = own.__func__
        del layer.__dict__["forward"]
    layer.__dict__["_veneer"] = state
    layer.__class__ = adapted_class(state.base)
    if "_old_forward" in layer.__dict__:
        layer.__dict__["_old_forward"] = types.MethodType(type(layer).forward, layer)
    return state


def adapt_carrier(block: nn.Module, router: Router, name: str, place: int) -> None:
    """Let a block take a prefix although checkpointing takes its cache away."""
    adapt_class(block, router).insert(CarriedPrefix(name, place))


def restore_class(layer: nn.Module) -> None:
    """Undo `take_over`."""
    state: AdaptedState = layer.__dict__.pop("_veneer")
    layer.__class__ = state.base
    if state.split is not None:
        tensor_parallel.put_back(layer, *state.split)
    if state.instance_forward is not None:
        layer.__dict__["forward"] = types.MethodType(state.instance_forward, layer)
    if "_old_forward" in layer.__dict__:
        layer.__dict__["_old_forward"] = types.MethodType(state.base.forward, layer)
