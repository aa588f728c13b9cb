"""The registry of methods, and the decorator that fills it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..targets.suggest import suggest
from .base import ActsOn, Method
from .config import REGISTRY
from .config_file import refuse_foreign
from .peft_types import PUBLIC, import_methods
from .tensors import Constant, Declared, Trained

# What a method may say at each kind of site. At the others, nothing calls it.
HOOKS_AT: Mapping[ActsOn, tuple[str, ...]] = {
    "layers": ("delta", "left", "right", "shift", "post"),
    "modules": ("post",),
    "stacks": ("prompt", "prefix", "objective"),
    "copies": (),
}
TRAINING_HOOKS = ("project", "penalty", "constrain", "step")  # of any method, around the optimizer's steps
HOOKS = tuple(dict.fromkeys(hook for hooks in HOOKS_AT.values() for hook in hooks))


def registry() -> dict[str, type[Method]]:
    """Every method by its `peft_type`."""
    import_methods()
    return REGISTRY


def __getattr__(name: str) -> Any:
    if name == "METHODS":  # the methods a user can name
        return {key: cls for key, cls in registry().items() if not cls.internal}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


C = TypeVar("C", bound="type[Method]")


def method(
    peft_type: str,
    *,
    foreign: Mapping[str, Any] | None = None,
    patterns: Mapping[str, str] | None = None,
    prefix: str | None = None,
    internal: bool = False,
) -> Callable[[C], C]:
    """Register a dataclass as the method `peft_type`.

    Args:
        peft_type: its name in `adapter_config.json`.
        foreign: fields that peft's config of this method has and this one does not, with peft's defaults.
            They are accepted at their default, in a call and in a file, and refused at any other value.
        patterns: config field holding per-module values -> the field those values replace
            (`{"rank_pattern": "r"}`).
        prefix: what the names of its tensors begin with in peft's tables; None for the lower-case `peft_type` and "_".
        internal: True for a companion that users name through another config's field.
    """

    def register(cls: C) -> C:
        cls.peft_name = peft_type
        cls.foreign = {**(foreign or {})}
        cls.patterns = {**(patterns or {})}
        cls.internal = internal
        cls.key_prefix = f"{peft_type.lower()}_" if prefix is None else prefix
        check_declarations(cls.__name__, cls.tensors, _defined(cls))
        cls.hooks = tuple(h for h in HOOKS if h in _defined(cls))
        cls.steered = tuple(h for h in TRAINING_HOOKS if h in _defined(cls))
        cls.acts_on = kind_of_site(cls)
        generated = cls.__init__

        def __init__(self: Method, *args: Any, **kwargs: Any) -> None:
            known = {f.name for f in dataclasses.fields(self) if f.init}
            for name in [n for n in kwargs if n not in known]:
                if name not in cls.foreign:
                    allowed = [*known, *cls.foreign]
                    raise TypeError(f"{cls.__name__} has no argument {name!r}{suggest(name, allowed)}")
                refuse_foreign(cls, name, kwargs.pop(name))
            generated(self, *args, **kwargs)

        __init__.__wrapped__ = generated  # type: ignore[attr-defined]  # keeps the signature readable
        cls.__init__ = __init__  # type: ignore[method-assign]
        REGISTRY[peft_type] = cls
        PUBLIC.update({} if internal else {peft_type: None})
        return cls

    return register


def kind_of_site(cls: type[Method]) -> ActsOn:
    """Derive what a method acts on from the hooks that it defines.

    Raises:
        TypeError: no hook, or one that nothing calls beside the others.
    """
    hooks = cls.hooks
    found: ActsOn = "stacks" if {"prompt", "prefix"} & set(hooks) else cls.acts_on
    idle = [h for h in hooks if h not in HOOKS_AT[found]]
    if found == "copies" and not hooks:
        return found
    if not hooks:
        raise TypeError(f"{cls.__name__} defines none of {', '.join(HOOKS)}, so it would change nothing; define one")
    if idle:
        places = [f"{', '.join(h)} on {kind}" for kind, h in HOOKS_AT.items() if h]
        raise TypeError(
            f"{cls.__name__} acts on {found} and defines {', '.join(idle)}, which nothing calls there; there are "
            f"{'; '.join(places)}. Leave it out, define a prompt or a prefix for a method on stacks, or set acts_on"
        )
    return found


def _defined(cls: type) -> set[str]:
    return {name for base in cls.__mro__ if base not in Method.__mro__ for name in vars(base)}


def check_declarations(cls_name: str, tensors: Mapping[str, Declared], defined: Iterable[str]) -> None:
    """Raise TypeError for tensors that could not be saved or made, given the names that a method's class defines."""
    for key, one in tensors.items():
        if not isinstance(one, (Trained, Constant)):
            raise TypeError(f"{cls_name}.tensors[{key!r}] is {one!r}; declare it as Trained(...) or Constant(...)")
    first = [key for key, one in tensors.items() if one.shared == "first"]
    if first and len(first) < len(tensors):
        raise TypeError(f"{cls_name}.tensors: either all tensors are shared='first' or none; here only {first} are")
    for key, one in tensors.items():
        if one.trained and one.name is None and one.name_at is None and "exported" not in defined:
            raise TypeError(
                f"{cls_name}.tensors[{key!r}] is trained, has no name in the file and would be lost; give it a name, or "
                "define exported(), which returns what the file holds"
            )
        if one.shared not in ("", "first") and "init_shared" not in defined:
            raise TypeError(
                f"{cls_name}.tensors[{key!r}] is shared by the adapter, and nothing makes it; define init_shared()"
            )
