"""`adapter_config.json`: fields, types and versions."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from ..io.atomic_write import hold_lock, pending_path, save_bytes
from ..io.locate import CONFIG_NAME, folder_to_write
from ..targets.suggest import suggest

PEFT_VERSION = "0.21.2"  # the layout written here


class FileConfig(Protocol):
    """A config class, by what reading and writing its file needs."""

    peft_name: ClassVar[str]
    foreign: ClassVar[dict[str, Any]]
    internal: ClassVar[bool]
    from_file: bool
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init__(self, **fields: object) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...


C = TypeVar("C", bound=FileConfig)


def config_from_dict(
    values: Mapping[str, Any], registry: Mapping[str, type[C]], expected: type[C] | None, where: str
) -> C:
    """Build a config from the content of `adapter_config.json`.

    Args:
        values: the content.
        registry: the methods by `peft_type`.
        expected: the method it must be of, or None for any.
        where: the file's path, for messages.

    Raises:
        ValueError: another method, or fields that cannot be honoured.
    """
    name = values.get("peft_type")
    methods = {k: c for k, c in registry.items() if not c.internal}
    cls = methods.get(str(name))
    if cls is None:
        raise ValueError(
            f"{where}: peft_type {name!r} is not a method of this version{suggest(str(name), methods)}; "
            f"there are {', '.join(sorted(methods))}"
        )
    if expected is not None and cls is not expected:
        raise ValueError(
            f"{where}: this is a config of {name!r} ({cls.__name__}), not of {expected.peft_name!r} "
            f"({expected.__name__}); use PeftConfig.from_pretrained to read any method"
        )
    fields = field_types(cls)
    known, unknown = {}, []
    for key, value in values.items():
        if key in fields:
            check_value(fields[key], value, f"{where}: {key}")
            known[key] = value
        elif key in cls.foreign:
            refuse_foreign(cls, key, value)
        elif not value:  # None, False, 0, "", [], {}: how a field that is not in use is written
            unknown.append(key)
        else:
            version = values.get("peft_version")
            raise ValueError(
                f"{where}: {key}={value!r} is a field that {cls.__name__} does not know (written by peft {version}), "
                "and ignoring it would change the result; use a version of Veneer that has it, or remove the field "
                "from the file if it does not matter"
            )
    if unknown:
        warnings.warn(
            f"{where}: fields unknown to {cls.__name__} were ignored, all at their default: "
            f"{', '.join(sorted(unknown))} (written by peft {values.get('peft_version')})",
            stacklevel=3,
        )
    try:
        config = cls(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    config.from_file = True
    return config


def refuse_foreign(cls: type[FileConfig], name: str, value: object) -> None:
    """Raise ValueError if a peft field that Veneer does not have is set to more than its default."""
    default = cls.foreign[name]
    if value != default and not (not value and not default):
        raise ValueError(
            f"{cls.__name__}({name}={value!r}): Veneer does not support {name!r} yet, and ignoring it would "
            f"change the result; leave it at {default!r}"
        )


SIZES = 1 << 16  # the largest rank, number of virtual tokens or width that a file may ask memory for
NUMBERS = ("seed", "key", "token_id")  # in the names of whole numbers that are not sizes


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a config class that its file may have."""
    types = get_type_hints(cls)
    return {f.name: types[f.name] for f in dataclasses.fields(cls) if f.init}


def check_value(kind: object, value: object, where: str) -> None:
    """Raise ValueError if a field of a config file holds what its type does not allow, or a size beyond reason."""
    if not allows(kind, value):
        raise ValueError(f"{where}={str(value)[:80]!r}: must be of the type {describe_type(kind)}")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
    for held in (h for pair in pairs for h in pair):
        if type(held) is int and abs(held) > SIZES and not any(n in where.rpartition(" ")[2] for n in NUMBERS):
            raise ValueError(f"{where}={held}: {SIZES:,} is the most that a file may ask for")
        if isinstance(held, str) and (len(held) > SIZES or "\0" in held):
            raise ValueError(
                f"{where}={held[:40]!r}...: {len(held):,} characters; {SIZES:,} are allowed, none of them NUL"
            )


def allows(kind: Any, value: Any) -> bool:
    """Whether a type has this value of JSON's, in which sets are lists and keys are strings."""
    inner = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(allows(one, value) for one in inner)
    if get_origin(kind) in (list, set):
        return isinstance(value, list) and all(allows(inner[0], v) for v in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(allows(inner[1], v) for v in value.values())
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def describe_type(kind: Any) -> str:
    """A field's type in JSON's words."""
    if isinstance(kind, UnionType):
        return " | ".join(dict.fromkeys(map(describe_type, get_args(kind))))
    if kind is type(None):
        return "null"
    return str(kind).replace("set[", "list[") if get_args(kind) else str(kind.__name__)


def save_config(config: FileConfig, folder: str | os.PathLike[str], **changes: object) -> None:
    """Write `adapter_config.json` with some fields changed."""
    data = config_bytes({**config.to_dict(), **changes, "peft_version": PEFT_VERSION})
    target = folder_to_write(folder)
    with hold_lock(target):
        pending_path(target / CONFIG_NAME).unlink(missing_ok=True)
        save_bytes(target / CONFIG_NAME, data)


def config_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
