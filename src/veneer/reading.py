"""Reading files that a stranger may have written: bounded, and complained about before anything is allocated."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

JSON_BYTES = 16 << 20  # of a file of settings; the largest of peft's, with a rank for each layer, have some 100 KB
JSON_DEPTH = 32
HEADER_BYTES = 64 << 20  # of a safetensors file; safetensors itself takes 100 MB
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64, "F4": 4,
}  # fmt: skip


def json_object(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: a file larger than `limit` bytes; no UTF-8, no JSON or no object; a key that stands twice, of which
            readers take different ones; a number that JSON does not have; nesting deeper than `JSON_DEPTH`.
    """
    size = os.stat(path).st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, and a file of its kind {limit:,} at most; it was not read")
    try:
        values = json_text(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); save or fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be an object of keys and values")
    return values


def json_text(text: str) -> Any:
    """The value of a JSON text; see `json_object`."""
    try:
        values = json.loads(text, object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
    level: list[Any] = [values]
    for _ in range(JSON_DEPTH):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return values
    raise ValueError(f"nested deeper than {JSON_DEPTH} levels")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is larger than any float")
    return value


def tensor_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Key -> dtype and shape of the tensors in a safetensors file, and its metadata, from its header alone.

    The header is held against the file's size, so that nothing is allocated for what is not there, and its offsets must
    tile the data without gap or overlap, so that no two tensors are the same memory.

    Raises:
        ValueError: a damaged or hostile file; says what is wrong with it.
    """
    size = os.stat(path).st_size
    remedy = "the copy or download was cut short, or the file was changed; fetch or save it again"

    def damaged(why: str) -> ValueError:
        return ValueError(f"{path} is damaged ({size:,} bytes; {why}): {remedy}")

    with open(path, "rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > size - 8:
            raise damaged(f"it says that its header has {length:,} bytes")
        if length > HEADER_BYTES:
            raise damaged(f"a header of {length:,} bytes, where {HEADER_BYTES:,} are allowed")
        text = file.read(length)
    try:
        header = json_text(text.decode("utf-8"))
    except ValueError as error:
        raise damaged(f"its header is no valid JSON, {error}") from error
    if not isinstance(header, dict):
        raise damaged("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged("its metadata is no object of texts")
    found, spans = {}, []
    for key, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = ITEM_BITS[dtype]
        except (KeyError, TypeError, ValueError):
            raise damaged(f"{key[:80]!r} is described as {str(entry)[:80]}") from None
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise damaged(f"{key[:80]!r} has the shape {str(shape)[:60]} at {start}, {end}")
        if math.prod(shape) * bits != 8 * (end - start):
            raise damaged(f"{key[:80]!r} of shape {shape} in {dtype} has {end - start:,} bytes")
        found[key] = dtype, shape
        spans.append((start, end, key))
    at = 0
    for start, end, key in sorted(spans):
        if start != at:
            raise damaged(f"{key[:80]!r} begins at byte {start:,}, and what is before it ends at {at:,}")
        at = end
    if at != size - 8 - length:
        raise damaged(f"its tensors have {at:,} bytes, and there are {size - 8 - length:,}")
    return found, metadata
