"""The one abstract base of every fine-tuning method.

A method is a stateless dataclass: hyper-parameters, a little math (`Hooks`) and its tensors, declared one by one
(`Declared`). It maps its trained tensors at one site to linear operators; everything else is written once, elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from ..layers.site import Site
from ..targets.blocks import SublayerOutput
from ..targets.query import TargetQuery
from .config import REGISTRY, Config
from .fields import BiasField, SavedModules, TargetFields, require_same, union_of
from .hooks import Hooks, Tensors
from .peft_types import TASK_HEADS
from .tensors import Declared, declaration_of

OtherSublayers = Callable[[str], Mapping[str, "tuple[SublayerOutput, Method]"]]  # sub-layers of another adapter
# Weights of layers; whole modules, whose output `post` maps; stacks of blocks, in front of which virtual tokens go; modules
# that are trained as full copies.
ActsOn = Literal["layers", "modules", "stacks", "copies"]


@dataclass
class Method(Config, Hooks):
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

    tensors: ClassVar[Mapping[str, Declared]] = {}  # every tensor it can have at a site; see `Declared`
    components: ClassVar[
        tuple[str, ...]
    ] = ()  # parts of the file's keys below a module that no tensor's name begins with
    key_prefix: ClassVar[str] = ""  # what peft's names of its tensors begin with
    file_prefix: ClassVar[str] = "base_model.model."  # what the names of modules begin with in the file
    acts_on: ClassVar[ActsOn] = "layers"  # the kind of its sites; `method` derives "stacks" from the hooks
    hooks: ClassVar[tuple[str, ...]] = ()  # those that the class defines; set by `method`
    steered: ClassVar[tuple[str, ...]] = ()  # the training hooks that the class defines; set by `method`
    extra_inputs: ClassVar[tuple[str, ...]] = ()  # arguments of the model's forward that `objective` takes

    # Where it acts.

    def prepare(self, model: nn.Module) -> Self:
        """Return the config with what it leaves open filled in for a base model."""
        return self

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str] | Mapping[str, Any] | None:
        """Names of the places to adapt if the method finds them itself, else None for `target_modules`.

        `others` returns the sub-layers that another adapter of the model adapts, by that adapter's name.

        A mapping gives each name its key in the file, if that is not the name; a method on modules gives with each
        name the place in its block (`SublayerOutput`). A layer's bias is adapted at the layer, by `shift`; every other
        parameter is a site of its own, with `delta`.
        """
        return None

    def target_query(self) -> TargetQuery:
        """What the config says about the modules that it adapts."""
        given = {name: value for name, value in vars(self).items() if name in TargetQuery.__dataclass_fields__}
        return TargetQuery(**given, asked_by=type(self).__name__)

    def roles(self, there: Sequence[str]) -> Sequence[str]:
        """The stacks that are its sites, of those that are there: "model", or "encoder" and "decoder".

        `prompt` and `prefix` return None if no virtual tokens go there (by `site.role`); a decoder that is a site still
        sees those of its encoder.
        """
        return there

    def companions(self, model: nn.Module) -> list[Method]:
        """Further methods attached under the same adapter name (full copies of modules, rows, biases)."""
        made: list[Method] = []
        wanted, heads = self.copied_modules()
        if wanted or heads:
            made.append(REGISTRY["MODULES_TO_SAVE"](modules=wanted, optional=heads))
        if isinstance(self, BiasField) and self.bias == "all":
            made.append(REGISTRY["TRAINED_BIAS"]())
        return made

    def copied_modules(self) -> tuple[list[str], list[str]]:
        """Names of the modules that are trained as full copies: those that must exist, and a task's new heads."""
        heads = list(TASK_HEADS.get(self.task_type or "", ()))  # of these a model has one or none
        saved = self.modules_to_save if isinstance(self, SavedModules) else None
        return [m for m in saved or [] if m not in heads], heads

    @property
    def training_hooks(self) -> tuple[str, ...]:
        """The training hooks that act with this config: project, penalty, constrain, step."""
        return self.steered

    @property
    def uses(self) -> Collection[str]:
        """Names of the other adapters of the model that this one needs."""
        return ()

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens stand in front of a sequence."""
        return 0

    @property
    def is_prompt_learning(self) -> bool:
        return False

    # Its tensors.

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

    def shared_tensors(self) -> dict[str, Declared]:
        """The tensors that all sites of the adapter share."""
        return {k: t for k, t in self.tensors.items() if t.shared_by(self) == "adapter"}

    @property
    def first_for_all(self) -> bool:
        """Whether every site of the adapter uses the first one's tensors."""
        return any(t.shared == "first" for t in self.tensors.values())

    @property
    def every_site_saves(self) -> bool:
        """If all sites use the first one's tensors: whether each writes them to the file under its own key."""
        return all(t.saved_by(self) != "once" for t in self.tensors.values())

    # Weighted combinations.

    def combined(self, others: Sequence[Self], **options: object) -> Self:
        """The config of a weighted combination of an adapter with this one and adapters with `others`.

        `options` are what the method lets a caller choose.

        Raises:
            ValueError: configs that cannot be combined, or an option that the method does not have.
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
        if isinstance(self, TargetFields):
            every = [c for c in (self, *others) if isinstance(c, TargetFields)]
            changes["target_modules"] = union_of("target_modules", [c.target_modules for c in every])
            require_same("exclude_modules", [c.exclude_modules for c in every])
        if isinstance(self, SavedModules):
            every_saved = [c.modules_to_save for c in (self, *others) if isinstance(c, SavedModules)]
            changes["modules_to_save"] = list(dict.fromkeys(m for saved in every_saved for m in saved or ())) or None
        return self.replace(**changes)

    def combine(self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site) -> dict[str, Tensor]:
        """The tensors at `site` of a weighted combination of adapters, which this is the config of.

        `parts` are those that are at this site: the method of each there, and its tensors.
        """
        raise NotImplementedError


PeftConfig = Method
