"""A run: its fields, where their values come from, and what is allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ..targets.suggest import suggest
from .run import FIELDS, Run

PACKAGED = Path(__file__).parent


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: a YAML file, or the name of a packaged one.

    Raises:
        ValueError: no such recipe, no YAML, or no mapping.
    """
    path = Path(name)
    if not path.is_file():
        packaged = {p.stem: p for p in sorted(PACKAGED.glob("*.yaml"))}
        if name not in packaged:
            raise ValueError(
                f"recipe {name!r}: there is no such file; packaged recipes are {', '.join(packaged)}{suggest(name, packaged)}"
            )
        path = packaged[name]
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys and values, such as `model: smollm2-135m`")
    return values


def build_run(recipe: dict[str, Any], flags: dict[str, Any]) -> Run:
    """A run from a recipe's keys and the command's flags, which win.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or one out of range.
    """
    known = {f.name: f for f in FIELDS}
    values: dict[str, Any] = {}
    for key, value in recipe.items():
        if key not in known:
            raise ValueError(f"recipe: unknown key {key!r}{suggest(str(key), known)}; keys are {', '.join(known)}")
        values[key] = convert_value(known[key], value)
    method = values.pop("method", {"name": "lora"})
    method = dict(method) if isinstance(method, dict) else {"name": str(method)}
    if flags.get("method"):
        if flags["method"].lower() != str(method.get("name", "lora")).lower():
            method = {}  # another method's fields mean nothing to it
        method["name"] = flags["method"]
    for key, value in flags.items():
        if value is None:
            continue
        if key.startswith("method__"):
            method[key.removeprefix("method__")] = yaml.safe_load(value) if isinstance(value, str) else value
        elif key != "method":
            values[key] = convert_value(known[key], value)
    run = Run(**values, method=method)
    run.config()  # complains now, before anything is loaded
    return run


def convert_value(f: dataclasses.Field[Any], value: Any) -> Any:
    """A recipe's or a flag's value in the type of its field."""
    kind = str(f.type)
    if value is None or f.name == "method":
        return value
    try:
        if kind.startswith("int"):
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        if kind.startswith("float"):
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if kind == "bool":
            if not isinstance(value, bool):
                raise ValueError
            return value
    except (TypeError, ValueError):
        raise ValueError(f"{f.name}={value!r}: must be of type {kind.split(' |', maxsplit=1)[0]}") from None
    if not isinstance(value, str):
        raise ValueError(f"{f.name}={value!r}: must be text")
    return value
