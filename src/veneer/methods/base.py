"""The one abstract base of every fine-tuning method, and the registry of methods.

A method is a stateless dataclass: hyper-parameters, a little math and the names peft gives its tensors.
It maps its trained tensors at one site to linear operators; everything else is written once, elsewhere:

    W' = L (W R + Delta)            y = L (f(R x) + Delta x) + shift,   then post(x, y)
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..algebra.operators import Dense, Operator
from ..io.locate import read_config
from ..layers.site import Site
from ..targets.blocks import SublayerOutput
from ..targets.defaults import pattern_value
from ..targets.suggest import suggest
from .config_file import config_from_dict, save_config
from .peft_types import TASK_HEADS, PeftType, TaskType, import_methods
from .tensors import Declared, declaration_of

Tensors = Mapping[str, Tensor]
OtherSublayers = Callable[[str], Mapping[str, "tuple[SublayerOutput, Method]"]]  # sub-layers of another adapter
# Weights of layers; whole modules, whose output `post` maps; stacks of blocks, in front of which virtual tokens go; modules
# that are trained as full copies.
ActsOn = Literal["layers", "modules", "stacks", "copies"]
REGISTRY: dict[str, type[Method]] = {}  # by peft_type; `registry.method` fills it


@dataclass
class Method:
    """Base of every config. Public as `PeftConfig`.

    Args:
        task_type: one of `TaskType`, or None for any `nn.Module`.
        peft_type: set by the class; a value of another method is an error.
        auto_mapping: class and module of a base model that has no task type, as peft writes it.
        peft_version: version of peft the file was written for.
        base_model_name_or_path: hub id or folder of the base model.
        revision: revision of the base model.
        inference_mode: True freezes the adapter when it is attached.

    Raises:
        ValueError: an unknown `task_type`, or a hyper-parameter out of its range.
    """

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    peft_name: ClassVar[str] = ""
    recipe: ClassVar[Mapping[str, Any]] = {}  # `veneer train`'s defaults: keys of a run, or of this config
    tensors: ClassVar[Mapping[str, Declared]] = {}  # every tensor it can have at a site; see `Declared`
    components: ClassVar[tuple[str, ...]] = ()  # parts of the file's keys below a module that no tensor's name begins with
    key_prefix: ClassVar[str] = ""  # what peft's names of its tensors begin with
    foreign: ClassVar[dict[str, Any]] = {}
    patterns: ClassVar[dict[str, str]] = {}
    hooks: ClassVar[tuple[str, ...]] = ()
    internal: ClassVar[bool] = False
    acts_on: ClassVar[ActsOn] = "layers"  # the kind of its sites; `method` derives "stacks" from the hooks
    file_prefix: ClassVar[str] = "base_model.model."  # what the names of modules begin with in the file
    own_fields: ClassVar[frozenset[str]] = frozenset()  # fields that peft's config lacks; written where they are set
    extra_inputs: ClassVar[tuple[str, ...]] = ()  # arguments of the model's forward that `objective` takes
    from_file = False  # the config came from a file; set by the codec

    def __post_init__(self) -> None:
        cls = type(self)
        if self.peft_type is not None and str(getattr(self.peft_type, "value", self.peft_type)) != cls.peft_name:
            raise ValueError(
                f"{cls.__name__}(peft_type={self.peft_type!r}): this is a config of {cls.peft_name!r}; "
                f"use the config class of {self.peft_type!r} or leave peft_type out"
            )
        if cls.peft_name:
            self.peft_type = PeftType(cls.peft_name)
        if self.task_type is not None:
            task = str(getattr(self.task_type, "value", self.task_type))
            if task not in list(TaskType):
                raise ValueError(
                    f"{cls.__name__}(task_type={task!r}): must be None or one of {', '.join(TaskType)}"
                    f"{suggest(task.upper(), map(str, TaskType))}"
                )
            self.task_type = TaskType(task)
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            value = getattr(self, name, None)
            if isinstance(value, (list, tuple, frozenset)):
                setattr(self, name, set(value))  # as peft holds them; written sorted
        self.check()

    @classmethod
    def recipe_for(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """`recipe` as it holds beside what the user gave: the run's `task`, and fields of the config."""
        return cls.recipe

    # What a method may say.

    def check(self) -> None:
        """Raise ValueError if a hyper-parameter is out of range."""

    def init(self, site: Site) -> dict[str, Tensor]:
        """Return this method's fresh tensors at `site`, in the shapes of the file."""
        raise NotImplementedError

    def init_shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return tensors that all sites of the adapter share; `p` holds them at every site."""
        return {}

    def delta(self, p: Tensors, site: Site) -> Operator | None:
        """Delta in W' = L (W R + Delta)."""

    def left(self, p: Tensors, site: Site) -> Operator | None:
        """L, a square operator on the output side."""

    def right(self, p: Tensors, site: Site) -> Operator | None:
        """R, a square operator on the input side."""

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        """A vector (out,) added to the output."""

    def post(self, p: Tensors, site: Site, x: Any, y: Tensor) -> Tensor:
        """What no linear operator can say: maps the site's input and output to its new output.

        `x` is the input tensor of a layer; of a module (`acts_on = "modules"`) it is all its arguments, by name. Where
        `sites_of` gave places in blocks, it also holds the residual stream, under the name `site.spot.residual`.
        """
        return y

    def prompt(self, p: Tensors, site: Site, tasks: Tensor | None) -> Tensor | None:
        """Embeddings of virtual tokens in front of a stack's input, (T, width), or (batch, T, width) by task."""

    def prefix(self, p: Tensors, site: Site) -> Tensor | None:
        """Keys and values of virtual positions in a stack's layers, (layers, 2, heads, P, head width)."""

    def objective(self, logits: Tensor, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The training loss, from logits (batch, T + tokens, vocabulary) and labels (batch, tokens)."""
        raise NotImplementedError

    def roles(self, there: Sequence[str]) -> Sequence[str]:
        """The stacks that are its sites, of those that are there: "model", or "encoder" and "decoder".

        `prompt` and `prefix` return None where no virtual tokens go (by `site.role`); a decoder that is a site still
        sees those of its encoder.
        """
        return there

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens stand in front of a sequence."""
        return 0

    def loaded(self, site: Site) -> dict[str, Tensor]:
        """The tensors of an adapter that comes from a file; those that have a name are taken from it."""
        return self.init(site)

    def exported(self, p: Tensors, site: Site) -> dict[str, Tensor] | None:
        """What is written to the file where that is not what is trained, under the keys of `tensors`."""
        return None

    def combine(
        self, parts: Sequence[tuple[Method, Tensors]], weights: Sequence[float], site: Site
    ) -> dict[str, Tensor]:
        """The tensors at `site` of a weighted combination of adapters, which this is the config of.

        `parts` are those that are at this site: the method of each there, and its tensors.
        """
        raise NotImplementedError

    def combined(self, others: Sequence[Method], **options: Any) -> Method:
        """The config of a weighted combination of an adapter with this one and adapters with `others`.

        `options` are what the method lets a caller choose.
        """
        if type(self).combine is Method.combine:
            raise ValueError(
                f"{self.peft_name}: there is no weighted combination of adapters of this method; stack them with "
                'set_adapter(["a", "b"]) instead'
            )
        if options:
            raise ValueError(
                f"{self.peft_name}: combining adapters of this method takes weights only; leave {', '.join(options)} out"
            )
        changes: dict[str, Any] = {}
        if hasattr(self, "target_modules"):
            changes["target_modules"] = self.union("target_modules", others)
        self.same("exclude_modules", others)
        if copied := [m for c in (self, *others) for m in getattr(c, "modules_to_save", None) or ()]:
            changes["modules_to_save"] = list(dict.fromkeys(copied))
        return self.replace(**changes)  # type: ignore[no-any-return]

    @property
    def uses(self) -> Collection[str]:
        """Names of the other adapters of the model that this one needs."""
        return ()

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str] | Mapping[str, Any] | None:
        """Names of the places to adapt when the method finds them itself, else None for `target_modules`.

        `others` returns the sub-layers that another adapter of the model adapts, by that adapter's name.

        A mapping gives each name its key in the file, where that is not the name; a method on modules gives with each
        name the place in its block (`places.Spot`). A layer's bias is adapted at the layer, by `shift`; every other
        parameter is a site of its own, with `delta`.
        """
        return None

    def companions(self, model: nn.Module) -> list[Method]:
        """Further methods attached under the same adapter name (full copies of modules, rows, biases)."""
        made: list[Method] = []
        heads = list(TASK_HEADS.get(self.task_type or "", ()))  # of these a model has one or none
        wanted = [m for m in getattr(self, "modules_to_save", None) or [] if m not in heads]
        if wanted or heads:
            made.append(REGISTRY["MODULES_TO_SAVE"](modules=wanted, optional=heads))  # type: ignore[call-arg]
        if rows := getattr(self, "trainable_token_indices", None):
            made += REGISTRY["TRAINABLE_TOKENS"].for_rows(model, rows)  # type: ignore[attr-defined]
        if getattr(self, "bias", "none") == "all":
            made.append(REGISTRY["TRAINED_BIAS"]())
        return made

    def prepare(self, model: nn.Module) -> Method:
        """Return the config with what it leaves open filled in for a base model."""
        return self

    # What is the same for all of them.

    def declared(self, key: str) -> Declared:
        """The declaration of one of its tensors.

        Raises:
            TypeError: a tensor that the method does not declare.
        """
        found = declaration_of(self.tensors, key)
        if found is None:
            raise TypeError(
                f"{type(self).__name__} made a tensor {key!r} that it does not declare; its tensors are "
                f"{', '.join(map(repr, self.tensors))}"
            )
        return found

    def file_names(self, site: Site) -> dict[str, str]:
        """Tensor -> its name in the file, below the module's path, of those at `site` that have one."""
        own = {k: t.file_name(self, site) for k, t in self.tensors.items() if t.shared_by(self) != "adapter"}
        return {k: name for k, name in own.items() if name is not None}

    @property
    def first_for_all(self) -> bool:
        """Whether every site of the adapter uses the first one's tensors."""
        return any(t.shared == "first" for t in self.tensors.values())

    @property
    def every_site_saves(self) -> bool:
        """Where all sites use the first one's tensors, whether each writes them to the file under its own key."""
        return all(t.saved_by(self) != "once" for t in self.tensors.values())

    def shared_tensors(self) -> dict[str, Declared]:
        """The tensors that all sites of the adapter share."""
        return {k: t for k, t in self.tensors.items() if t.shared_by(self) == "adapter"}

    def init_bias(self, site: Site) -> dict[str, Tensor]:
        """A trained copy (out,) of the layer's bias, where the config's `bias` asks for one."""
        own = site.bias
        packed = site.kind.bias != "bias"  # an attention's packed bias, which peft does not train either
        if own is None or packed or getattr(self, "bias", "none") == "none":
            return {}
        return {"bias": site.computed(tuple(own.shape), lambda: own)}

    def bias_shift(self, p: Tensors, site: Site) -> Tensor | None:
        """The change (out,) that a trained bias makes."""
        own = site.bias
        if own is None or "bias" not in p:
            return None
        return p["bias"] - own.to(device=p["bias"].device, dtype=p["bias"].dtype)

    def union(self, field: str, others: Sequence[Method]) -> set[str] | str | None:
        """What a field means for several configs together: names, or one regular expression for all of them."""
        values = [getattr(c, field) for c in (self, *others)]
        if all(v is None for v in values):
            return None
        if not any(isinstance(v, str) for v in values):
            values = [v or () for v in values]  # attached adapters without targets of their own
            return set().union(*values)
        if all(isinstance(v, str) for v in values):
            return "|".join(f"({v})" for v in dict.fromkeys(values)) if len(set(values)) > 1 else str(values[0])
        raise ValueError(
            f"{field} is a regular expression for some of these adapters and a list for others ({values!r}); adapters "
            "can be combined where it is the same for all"
        )

    def same(self, field: str, others: Sequence[Method]) -> None:
        """Raise ValueError if a field is not the same for all of several configs."""
        for other in others:
            if getattr(self, field, None) != getattr(other, field, None):
                raise ValueError(
                    f"adapters can be combined where {field} is the same for all; here it is {getattr(self, field)!r} "
                    f"and {getattr(other, field)!r}"
                )

    def init_copy(self, site: Site) -> Tensor:
        """A trained copy of the site's weight, in the layer's own layout."""
        stored = site.stored()
        return site.computed(tuple(stored.shape), lambda: stored)

    def copy_delta(self, copied: Tensor, site: Site) -> Operator:
        """The change (out, in) that a trained copy of the weight makes."""
        return Dense(site.matrix(copied) - site.weight().to(device=copied.device, dtype=copied.dtype))

    def weighted_copy(self, own: Tensor, copies: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """A base tensor plus the weighted sum of what its trained copies change it by."""
        start = own.to(copies[0])
        total = start.clone()
        for copied, weight in zip(copies, weights, strict=True):
            total = total + (copied - start) * weight
        return total

    def at(self, name: str) -> Method:
        """Return the config as it holds at the module `name`, after its `*_pattern` fields."""
        changed = {}
        for field, target in self.patterns.items():
            table = getattr(self, field)
            if table:
                value = pattern_value(table, name, None)
                if value is not None:
                    changed[target] = value
        return self.replace(**changed) if changed else self

    def replace(self, **changes: Any) -> Any:
        """Return a copy with some fields changed; the copy is checked like a new config."""
        made = copy.copy(self)
        for name, value in changes.items():
            setattr(made, name, value)
        made.__post_init__()
        return made

    @property
    def is_prompt_learning(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, sets sorted, as they are written to the file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {n: _plain(v) for n, v in values.items() if n not in self.own_fields or v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "config") -> Method:
        """Build the config that `values` (the content of `adapter_config.json`) describes.

        Raises:
            ValueError: no or another `peft_type`, or an unknown field that would change the result.
        """
        import_methods()
        return config_from_dict(values, REGISTRY, cls if cls.peft_name else None, where)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read `adapter_config.json` from a folder or a hub id; hub arguments: `revision`, `token`, `cache_dir`."""
        values, path = read_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return cls.from_dict(values, where=path)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, atomically."""
        save_config(self, save_directory)


PeftConfig = Method


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
