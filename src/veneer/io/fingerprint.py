"""Which base model an adapter belongs to: architecture, sizes, values sampled from the weights, and the tokenizer.

A fingerprint travels in the metadata of `adapter_model.safetensors`, so that it is wherever the weights are; peft and
other readers pass over it. Sampled values are kept as bfloat16, to which the float32, float16 and bfloat16 copies of a
model round alike; quantized weights are left out, as their values depend on the format.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import sharding
from . import safe_read

KEY = "veneer.base"  # in the metadata of a safetensors file
FORMAT = 1
TENSORS, VALUES = 48, 16  # sampled tensors, and values of each
LARGEST = 1 << 20  # characters of a fingerprint that is read
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, lie evenly and meet no period of a layout
GATHERED = 1 << 26  # entries of a sharded tensor up to which it is gathered for this

# What a config calls its sizes. Another value of the first ones is another architecture.
SIZES = {
    "width": ("hidden_size", "d_model", "n_embd", "dim"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers"),
    "heads": ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads"),
    "key-value heads": ("num_key_value_heads",),
    "feed-forward width": ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim"),
    "experts": ("num_local_experts", "num_experts"),
    "vocabulary": ("vocab_size",),
}


class BaseMismatchWarning(UserWarning):
    """An adapter was loaded onto a base with other weights than the one that it was trained on."""


@dataclass(frozen=True)
class Sample:
    """A tensor's shape, and some of its values as bfloat16 bits, two bytes each."""

    shape: tuple[int, ...]
    values: bytes


@dataclass(frozen=True)
class Fingerprint:
    """A base model, described so that it is known again.

    Attributes:
        architecture: name of the model's class.
        sizes: `model_type` and the sizes of its config, by what `SIZES` calls them.
        weights: parameter name -> sample; quantized and sharded ones may be left out.
        tokenizer: hash of vocabulary and special tokens, or None where none was at hand.
    """

    architecture: str
    sizes: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Sample] = field(default_factory=dict)
    tokenizer: str | None = None

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits for people: a hash over sizes and sampled values."""
        mine = json.loads(self.to_json())
        mine.pop("tokenizer", None)
        return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:12]

    def without(self, keys: Iterable[str]) -> Fingerprint:
        """Less the tensors that an adapter's file brings itself, by its keys: full copies, as of a new head."""
        brought = {k.removeprefix("base_model.model.") for k in keys}
        return dataclasses.replace(self, weights={n: s for n, s in self.weights.items() if n not in brought})

    def to_json(self) -> str:
        weights = {n: [list(s.shape), base64.b64encode(s.values).decode()] for n, s in self.weights.items()}
        values = {"format": FORMAT, "architecture": self.architecture, "sizes": self.sizes, "weights": weights}
        return json.dumps(values | ({"tokenizer": self.tokenizer} if self.tokenizer else {}), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str = "fingerprint") -> Fingerprint | None:
        """Read one; None for a format of a later version.

        Raises:
            ValueError: it is no fingerprint.
        """
        try:
            if len(text) > LARGEST:
                raise ValueError(f"{len(text):,} characters; {LARGEST:,} are allowed")
            values = safe_read.json_text(text)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            if values.get("format") != FORMAT:
                return None
            weights = {}
            for name, (shape, packed) in dict(values["weights"]).items():
                sample = Sample(tuple(int(n) for n in shape), base64.b64decode(packed, validate=True))
                if len(sample.values) > 2 * VALUES or len(sample.values) % 2:
                    raise ValueError(f"{name} has {len(sample.values)} bytes of values")
                weights[str(name)] = sample
            sizes = {str(k): v for k, v in dict(values["sizes"]).items() if isinstance(v, (int, str))}
            tokenizer = values.get("tokenizer")
            return cls(str(values["architecture"]), sizes, weights, None if tokenizer is None else str(tokenizer))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{where}: its {KEY!r} is no fingerprint of a base model ({error}); the file was tampered with or damaged: "
                "fetch or save it again"
            ) from error


@dataclass
class Differences:
    """How a base model differs from the one that an adapter was trained on.

    Attributes:
        shapes: what makes it another architecture or size: the adapter means nothing there.
        weights: what says that it holds other values: the adapter works, and its effect is not what was measured.
        compared: sampled tensors that could be compared.
    """

    shapes: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    compared: int = 0

    def describe(self) -> str:
        return "; ".join([*self.shapes, *self.weights])


def fingerprint_of(model: nn.Module, tokenizer: object = None) -> Fingerprint:
    """The fingerprint of a base model, with or without adapters on it; merged ones must be unmerged.

    Under ZeRO-3 and tensor parallelism it gathers some tensors: every process calls it.

    Args:
        model: the base model.
        tokenizer: its tokenizer, or None.
    """
    own = {n: p for n, p in model.named_parameters() if ":" not in n and is_comparable(p)}
    return Fingerprint(
        type(model).__dict__.get("_veneer_base", type(model)).__name__,
        sizes_of(model),
        sample_values({n: own[n] for n in spread_positions(list(own))}),
        None if tokenizer is None else of_tokenizer(tokenizer),
    )


def describe_outline(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model without values, with zeros in their place: as long as the real one."""
    own = {n: p for n, p in model.named_parameters() if ":" not in n and p.is_floating_point() and p.numel()}
    zeros = {
        n: Sample(tuple(own[n].shape), bytes(2 * min(own[n].numel(), VALUES))) for n in spread_positions(list(own))
    }
    return Fingerprint(type(model).__dict__.get("_veneer_base", type(model)).__name__, sizes_of(model), zeros)


def spread_positions(names: list[str]) -> list[str]:
    """At most 48 of the names, evenly."""
    step = max(len(names) / TENSORS, 1.0)
    return [names[int(i * step)] for i in range(min(TENSORS, len(names)))]


def is_comparable(parameter: Tensor) -> bool:
    """Whether a parameter has values that are the same in each copy of a model, here and at hand."""
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    sharded = sharding.is_sharded(parameter) and math.prod(sharding.shape_of(parameter)) <= GATHERED
    floats = parameter.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    there = parameter.device.type != "meta" and math.prod(sharding.shape_of(parameter)) > 0
    return floats and there and (sharded if sharding.is_sharded(parameter) else plain)


def sample_values(tensors: Mapping[str, Tensor]) -> dict[str, Sample]:
    """Shape and values of each; one copy from each device."""
    with torch.no_grad(), sharding.gathered_in_place(tensors.values()):
        found: dict[torch.device, list[Tensor]] = {}
        order: dict[torch.device, list[str]] = {}
        for name, tensor in tensors.items():
            held = sharding.gathered(tensor.detach())  # of any shape
            picked = held.take(sample_positions(held.numel()).to(held.device)).to(torch.bfloat16)  # (values,)
            found.setdefault(held.device, []).append(picked)
            order.setdefault(held.device, []).append(name)
        values: dict[str, bytes] = {}
        for device, parts in found.items():
            data = torch.cat(parts).view(torch.int16).cpu().numpy().tobytes()
            start = 0
            for name, part in zip(order[device], parts, strict=True):
                values[name] = data[start : start + 2 * part.numel()]
                start += 2 * part.numel()
    return {n: Sample(tuple(sharding.shape_of(t)), values[n]) for n, t in tensors.items()}


@functools.lru_cache(maxsize=256)
def sample_positions(entries: int) -> Tensor:
    """Which entries of a flat tensor are sampled: (min(entries, 16),) int64."""
    if entries <= VALUES:
        return torch.arange(entries)
    return torch.tensor([int((i + 1) * GOLDEN % 1.0 * entries) for i in range(VALUES)])


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """`model_type` and sizes, as the model's config says, or nothing."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {"model_type": getattr(config, "model_type", None)}
    for size, spellings in SIZES.items():
        found[size] = next((v for s in spellings if isinstance(v := getattr(text, s, None), int)), None)
    return {k: v for k, v in found.items() if v is not None}


def of_tokenizer(tokenizer: object) -> str | None:
    """A hash over a tokenizer's vocabulary and special tokens; None for what has no vocabulary."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not hasattr(inner, "get_vocab"):
        return None
    special = {k: str(v) for k, v in getattr(inner, "special_tokens_map", {}).items()}
    text = json.dumps([sorted(inner.get_vocab().items()), sorted(special.items())], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint in a safetensors file, less what the file brings itself, or None where there is none.

    Raises:
        ValueError: what stands in its place is none.
    """
    keys, metadata = safe_read.tensor_header(path)
    text = metadata.get(KEY)
    found = None if text is None else parse_fingerprint(text, str(path))
    return None if found is None else found.without(keys)


@functools.lru_cache(maxsize=8)
def parse_fingerprint(text: str, where: str) -> Fingerprint | None:
    """See `Fingerprint.from_json`."""
    return Fingerprint.from_json(text, where)


def compare_base(then: Fingerprint, model: nn.Module, tokenizer: object = None) -> Differences:
    """How a base model differs from the one that was fingerprinted; see `Differences`.

    Args:
        then: the fingerprint in an adapter's file.
        model: the base model.
        tokenizer: its tokenizer, or None, which is then not compared.
    """
    found = Differences()
    now = sizes_of(model)
    for size in dict.fromkeys([*then.sizes, *now]):
        a, b = then.sizes.get(size), now.get(size)
        if a is None or b is None or a == b:
            continue
        said = f"{size} was {a} and is {b} here"
        (found.weights if size == "vocabulary" else found.shapes).append(said)  # a vocabulary may be resized
    own = unwrap_base(model, then)
    both = {n: s for n, s in then.weights.items() if n in own and is_comparable(own[n])}
    shapes = {n: tuple(sharding.shape_of(own[n])) for n in both}
    alike = {n: s for n, s in both.items() if shapes[n] == s.shape}
    other = [n for n in both if n not in alike and shapes[n][1:] != both[n].shape[1:]]  # but for resized vocabularies
    if other and not found.shapes:
        n = other[0]
        found.shapes.append(f"{n} was {list(both[n].shape)} and is {list(shapes[n])} here, and {len(other) - 1} more")
    here = sample_values({n: own[n] for n in alike})
    apart = {n: far_apart(alike[n].values, here[n].values) for n in alike}
    changed = {n: d for n, d in apart.items() if d is not None}
    found.compared = len(alike)
    if changed and not found.shapes:
        worst = max(changed, key=lambda n: changed[n])
        found.weights.insert(
            0,
            f"{len(changed)} of {len(alike)} sampled tensors hold other values (furthest apart: {worst}, by "
            f"{changed[worst]:.2g})",
        )
    mine = None if tokenizer is None else of_tokenizer(tokenizer)
    if mine and then.tokenizer and mine != then.tokenizer:
        found.weights.append("the tokenizer has another vocabulary or other special tokens")
    return found


def unwrap_base(model: nn.Module, then: Fingerprint) -> dict[str, Tensor]:
    """A model's parameters by the names that a fingerprint has them under, which may be of a class with another head."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    inner = getattr(model, "base_model_prefix", "") or "model"
    for name in then.weights:
        other = name.removeprefix(f"{inner}.") if name.startswith(f"{inner}.") else f"{inner}.{name}"
        if name not in own and other in own:
            own[name] = own[other]
    return own


def far_apart(a: bytes, b: bytes) -> float | None:
    """The largest difference of two samples of one shape, or None where they are equal up to rounding.

    float32 and bfloat16 copies give the same bits; a float16 copy rounds twice, and so one value in sixteen is a step off.
    """
    if a == b or len(a) != len(b):
        return None if a == b else math.inf
    x, y = (torch.frombuffer(bytearray(v), dtype=torch.int16).view(torch.bfloat16).float() for v in (a, b))
    off = (x - y).abs()  # (values,)
    off = torch.where(x.isnan() & y.isnan(), 0, off)
    step = torch.maximum(x.abs(), y.abs()) * 2**-7 + 6e-8  # of bfloat16, and of float16 near 0
    if bool((off <= step).all()) and int((off > 0).sum()) <= max(3, len(off) // 2):
        return None
    return float(off.nan_to_num(nan=math.inf).max())
