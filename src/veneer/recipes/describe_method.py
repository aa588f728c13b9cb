"""Describes a method from the docstrings of its file, for `veneer methods` and for its page."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from ..methods.base import Method
from ..methods.config_file import describe_type, field_types
from .run import training_defaults

BASES = Method.__mro__  # their fields are every config's, and are not a method's to describe

PAPER = re.compile(r"^(?P<title>.+?)\. (?P<paper>.*?\d{4}, arxiv\.org/abs/[\d.]+\d.*?)(?:: +(?P<equation>\S.*))?$")


@dataclass
class MethodDescription:
    """A method as its file describes it.

    Attributes:
        title: its name, as the paper has it.
        summary: what it does, one line.
        paper: who, when, where, and the equation's number.
        equation: the equation, or an empty string.
        references: lines of the file's references.
        text: what its docstring says beside the fields.
        fields: name, type, default and meaning of each field.
        merges: whether it can be merged into the base weights.
        adapts: where it acts.
        training: what `veneer train` uses where the user says nothing.
    """

    title: str
    summary: str
    paper: str
    equation: str
    references: list[str]
    text: str
    fields: list[tuple[str, str, str, str]]
    merges: bool
    adapts: str
    training: dict[str, Any]


def describe_method(cls: Any) -> MethodDescription:
    """Read the docstrings of a config class and of its file."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    module = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    head, _, rest = doc.partition("\n\n")
    first = " ".join(head.split("\n"))
    found = PAPER.match(first)
    line = module.partition("\n")[0]
    summary = line.partition(": ")[2] if found else first
    text = re.split(r"^(?:Args|Raises|References):", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()
    references = re.split(r"^References:\n", module, maxsplit=1, flags=re.MULTILINE)[1:]
    # A field that several methods share is described in the class that declares it; its own class may say more.
    docs = [inspect.cleandoc(vars(base).get("__doc__") or "") for base in reversed(cls.__mro__) if base not in BASES]
    texts = {name: text for doc in docs for name, text in read_args(doc.splitlines()).items()}
    own = sorted(dataclasses.fields(cls), key=lambda f: f.kw_only is True)  # the shared ones last
    types = field_types(cls)
    fields = [
        (f.name, describe_type(types[f.name]), repr(_default_of(f)), texts[f.name])
        for f in own if f.init and f.name in texts
    ]  # fmt: skip
    return MethodDescription(
        title=found["title"] if found else cls.__name__.removesuffix("Config"),
        summary=summary[:1].upper() + summary[1:],
        paper=found["paper"] if found else "",
        equation=(found["equation"] or "") if found else "",
        references=[r.strip() for r in "".join(references).splitlines() if r.strip()],
        text=text,
        fields=fields,
        merges=cls.acts_on != "stacks" and "post" not in cls.hooks,
        adapts=_describe_place(cls),
        training=training_defaults(cls),
    )


def _describe_place(cls: Any) -> str:
    """Where a method acts, as a sentence."""
    names = {f.name for f in dataclasses.fields(cls)}
    if cls.acts_on == "stacks":
        return "The model's input: virtual tokens in front of each sequence."
    if cls.acts_on == "modules":
        return "The output of sub-layers and other modules."
    if "target_modules" in names:
        bare = ", and bare parameters such as fused experts" if "target_parameters" in names else ""
        return f"The layers that `target_modules` names{bare}."
    return "Parameters that it finds itself."


def _default_of(f: Any) -> Any:
    """The default of a config's field."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def read_args(lines: list[str]) -> dict[str, str]:
    """Field -> its text in the "Args:" part of a docstring without its indent."""
    texts: dict[str, str] = {}
    current, inside = "", False
    for line in lines:
        stripped = line.strip()
        if stripped.endswith(":") and " " not in stripped and not line.startswith(" "):
            inside = stripped == "Args:"
        elif inside and line.startswith(" " * 4) and not line.startswith(" " * 8):
            current, _, text = stripped.partition(": ")
            texts[current] = text
        elif inside and current and stripped:
            texts[current] += f" {stripped}"
    return texts
