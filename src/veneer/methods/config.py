"""The fields that every config has, and its file."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..io.locate import read_config
from ..targets.defaults import pattern_value
from ..targets.suggest import plain, suggest
from .config_file import config_from_dict, save_config
from .peft_types import PeftType, TaskType, import_methods

REGISTRY: dict[str, Any] = {}  # classes of methods  # by peft_type; `registry.method` fills it


@dataclass
class Config:
    """The fields of every config, and reading and writing `adapter_config.json`; see `Method`."""

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    peft_name: ClassVar[str] = ""
    recipe: ClassVar[Mapping[str, Any]] = {}  # `veneer train`'s defaults: keys of a run, or of this config
    foreign: ClassVar[dict[str, Any]] = {}  # fields of peft's config that are refused unless at their default
    patterns: ClassVar[dict[str, str]] = {}  # field with per-module values -> the field that they replace
    own_fields: ClassVar[frozenset[str]] = frozenset()  # fields that peft's config lacks; written where they are set
    internal: ClassVar[bool] = False  # a companion, which users name through another config's field
    from_file = False  # the config came from a file; set by the codec

    def __post_init__(self) -> None:
        cls = type(self)
        if self.peft_type is not None and plain(self.peft_type) != cls.peft_name:
            raise ValueError(
                f"{cls.__name__}(peft_type={self.peft_type!r}): this is a config of {cls.peft_name!r}; "
                f"use the config class of {self.peft_type!r} or leave peft_type out"
            )
        if cls.peft_name:
            self.peft_type = PeftType(cls.peft_name)
        if self.task_type is not None:
            task = plain(self.task_type) or ""
            if task not in list(TaskType):
                raise ValueError(
                    f"{cls.__name__}(task_type={task!r}): must be None or one of {', '.join(TaskType)}"
                    f"{suggest(task.upper(), map(str, TaskType))}"
                )
            self.task_type = TaskType(task)
        self.normalize()
        self.check()

    def normalize(self) -> None:
        """Bring fields to the types in which peft holds them."""

    def check(self) -> None:
        """Raise ValueError if a hyper-parameter is out of range."""

    @classmethod
    def recipe_for(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """`recipe` as it holds beside what the user gave: the run's `task`, and fields of the config."""
        return cls.recipe

    def at(self, name: str) -> Self:
        """Return the config as it holds at the module `name`, after its `*_pattern` fields."""
        changed = {}
        for field, target in self.patterns.items():
            value = pattern_value(vars(self)[field] or {}, name, None)
            if value is not None:
                changed[target] = value
        return self.replace(**changed) if changed else self

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; the copy is checked like a new config."""
        made = copy.copy(self)
        for name, value in changes.items():
            setattr(made, name, value)
        made.__post_init__()
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, sets sorted, as they are written to the file."""
        values = {f.name: vars(self)[f.name] for f in dataclasses.fields(self) if f.init}
        return {n: _as_json(v) for n, v in values.items() if n not in self.own_fields or v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "config") -> Any:
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


def _as_json(value: object) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, dict):
        return {k: _as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value]
    return value
