"""Reading files that a stranger may have written: bounded, and complained about before anything is allocated."""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

JSON_BYTES = 16 << 20  # of a file of settings; the largest of peft's, with a rank for each layer, have some 100 KB
JSON_DEPTH = 32
# In a safetensors file's metadata: xxh3 of its entries and its data; which tensors hold NaN, where some do.
CHECKSUM, NOT_FINITE = "veneer.checksum", "veneer.not_finite"
HEADER_BYTES = 64 << 20  # of a safetensors file; safetensors itself takes 100 MB
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


def json_object(path: Path, limit: int = JSON_BYTES, *, nan: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        limit: bytes that it may have.
        nan: whether NaN and infinity are let be, as figures of a run that diverged.

    Raises:
        ValueError: a file larger than `limit` bytes; no UTF-8, no JSON or no object; a key that stands twice, of which
            readers take different ones; a number that JSON does not have; nesting deeper than `JSON_DEPTH`.
    """
    size = os.stat(path).st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, and a file of its kind {limit:,} at most; it was not read")
    try:
        values = json_text(path.read_bytes().decode("utf-8"), nan=nan)
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); save or fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be an object of keys and values")
    return values


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of ours that has one a line; a last line that a killed process left half written is none."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            found.append(json_text(line, nan=True))
        except ValueError:
            continue
    return [m for m in found if isinstance(m, dict)]


def json_text(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text; see `json_object`."""
    numbers: dict[str, Any] = {} if nan else {"parse_constant": refuse_constant, "parse_float": check_finite}
    try:
        values = json.loads(text, object_pairs_hook=refuse_duplicates, **numbers)
    except RecursionError:
        raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from error
    level: list[Any] = [values]
    for _ in range(JSON_DEPTH):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return values
    raise ValueError(f"nested deeper than {JSON_DEPTH} levels")


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def check_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is larger than any float")
    return value


class NotFiniteWarning(UserWarning):
    """An adapter's file holds NaN or infinity."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in its mapped memory, once its header and its checksum, if any, are right.

    The checksum is for accidents, as of a disk or a copy, and not for forgers, who can compute it too.

    Raises:
        ValueError: a damaged or hostile file; says what is wrong with it.
    """
    found = stamp_checksum(path)
    header, metadata, begin = header_of(path, found)
    if found.size == begin:
        return {key: torch.empty(e["shape"], dtype=DTYPES[e["dtype"]]) for key, e in header.items()}
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # changes to a tensor stay in memory
    if CHECKSUM in metadata and tensor_checksum(header, memoryview(data)[begin:]) != metadata[CHECKSUM]:
        raise ValueError(
            f"{path} is damaged: its tensors are not those that were written (checksum). Fetch or save it again; whoever "
            f"changed it on purpose leaves {CHECKSUM!r} out of its metadata"
        )
    tensors = {}
    for key, entry in header.items():
        kind, start, count = DTYPES[entry["dtype"]], begin + entry["data_offsets"][0], math.prod(entry["shape"])
        held = torch.frombuffer(data, dtype=kind, count=count, offset=start) if count else torch.empty(0, dtype=kind)
        tensors[key] = (held if start % kind.itemsize == 0 else held.clone()).view(entry["shape"])
    said = metadata.get(NOT_FINITE) if CHECKSUM in metadata else not_finite(tensors)  # we look when we write
    if said:
        warnings.warn(
            f"{path}: {said} hold NaN or infinity, and so will what the model says with it; it was saved from a run that had "
            "diverged",
            NotFiniteWarning,
            stacklevel=5,
        )
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensors hold NaN or infinity, in words; nothing where none does."""
    floats = {k: t for k, t in tensors.items() if t.is_floating_point() and t.element_size() > 1}
    # The sum of what is finite can be infinite, so that it only clears.
    seldom = {
        k: t for k, t in floats.items() if not bool(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite())
    }
    bad = [k for k, t in seldom.items() if not bool(t.isfinite().all())]
    return f"{bad[0]} and {len(bad) - 1} more of {len(tensors)} tensors" if bad else ""


def tensor_checksum(header: Mapping[str, Any], data: Any) -> str:
    """A hash over a safetensors file's entries, by key, and the bytes of its tensors."""
    from xxhash import xxh3_128

    entries = [[k, v["dtype"], v["shape"], v["data_offsets"]] for k, v in sorted(header.items())]
    made = xxh3_128(json.dumps(entries).encode())
    made.update(data)
    return made.hexdigest()


class Stamp(NamedTuple):
    """What a file was when it was looked at."""

    node: int
    size: int
    changed: int  # ns


def stamp_checksum(path: Path) -> Stamp:
    found = os.stat(path)
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def tensor_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Key -> dtype, shape and data_offsets of the tensors in a safetensors file, and its metadata; see `header_of`."""
    header, metadata, _ = header_of(path, stamp_checksum(path))
    return dict(header), dict(metadata)


@functools.lru_cache(maxsize=4)
def header_of(path: Path, now: Stamp) -> tuple[dict[str, Any], dict[str, str], int]:
    """The entries of the tensors in a safetensors file, its metadata, and where its data begin.

    The header is held against the file's size, so that nothing is allocated for what is not there, and its offsets must
    tile the data without gap or overlap, so that no two tensors are the same memory.

    Raises:
        ValueError: a damaged or hostile file; says what is wrong with it.
    """
    size = now.size
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
    spans = []
    for key, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            size_of = DTYPES[dtype].itemsize
        except (KeyError, TypeError, ValueError):
            raise damaged(f"{key[:80]!r} is described as {str(entry)[:80]}") from None
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise damaged(f"{key[:80]!r} has the shape {str(shape)[:60]} at {start}, {end}")
        if math.prod(shape) * size_of != end - start:
            raise damaged(f"{key[:80]!r} of shape {shape} in {dtype} has {end - start:,} bytes")
        spans.append((start, end, key))
    at = 0
    for start, end, key in sorted(spans):
        if start != at:
            raise damaged(f"{key[:80]!r} begins at byte {start:,}, and what is before it ends at {at:,}")
        at = end
    if at != size - 8 - length:
        raise damaged(f"its tensors have {at:,} bytes, and there are {size - 8 - length:,}")
    return header, metadata, 8 + length
