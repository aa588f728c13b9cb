"""What a config says about the modules that it adapts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

Names = set[str] | list[str] | str | None  # suffixes of names, a regular expression, or "all-linear"


def as_names(given: str | Collection[str] | None) -> Names:
    """Names as peft holds them: a set, which files have sorted; anything else is left for a check to refuse."""
    return set(given) if isinstance(given, (list, tuple, frozenset)) else given  # type: ignore[return-value]


@dataclass(kw_only=True)
class TargetQuery:
    """The fields that choose modules and bare parameters of a model.

    Attributes:
        target_modules: names (suffixes), a regular expression, or "all-linear"; None for the architecture's default.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: indices of the layers to adapt; None for all.
        layers_pattern: name of the list those indices count, such as "layers".
        target_parameters: names (suffixes) of bare parameters.
        modules_to_save: modules that are trained as full copies, and are not adapted.
        peft_type: the method, for its defaults.
        task_type: the task, for the heads that "all-linear" leaves out.
        asked_by: who asks, for messages.
    """

    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    peft_type: str | None = None
    task_type: str | None = None
    asked_by: str = "this config"
