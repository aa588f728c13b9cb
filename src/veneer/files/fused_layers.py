"""Files of LoRA on layers that are fused here and were apart where they were trained, or the other way round.

Both ways are exact. Layers y_i = W_i x with B_i A_i become one with A = [A_1; A_2; ...] and B = diag(B_1, B_2, ...), whose
rank is the sum of theirs; a fused layer's B falls into the rows of its parts, which all have its A.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import layers
from ..lifecycle.keys import PREFIX, file_key
from ..methods.base import Method
from ..targets.defaults import pattern_value
from .renamed_modules import place_keys, rename_key, renaming_tables

if TYPE_CHECKING:
    from ..lifecycle.adapters import Runtime

KEY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<n>\d+)\.(?P<leaf>\w+)")
PLAIN = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
Pair = tuple[Tensor, Tensor]  # A (r, in), B (out, r)
Cells = dict[
    tuple[int, int], tuple[str, Pair]
]  # (expert, part) of a fused weight -> what layer it was, and its factors


@functools.cache
def fused_parts(kind: str) -> dict[str, list[list[str]]]:
    """One table of layouts.toml: name of a fused layer -> the names of each of its parts."""
    with open(Path(__file__).with_name("layouts.toml"), "rb") as file:
        found: dict[str, list[list[str]]] = tomllib.load(file)[kind]
    return found


def refit_fused(
    runtime: Runtime, config: Any, tensors: Mapping[str, Tensor]
) -> tuple[Method, Mapping[str, Tensor], str]:
    """A LoRA's config and tensors for the layers that the base model has.

    Args:
        runtime: of the base model.
        config: the file's.
        tensors: by their keys in the file.

    Returns:
        Both, and a line on what was done; as they were, and "", where all layers are as in the file or cannot be brought
        to what is here.

    Raises:
        ValueError: layers that would fit, with settings that are not the same on fused ones (DoRA, biases).
    """
    root = runtime.root
    if config.peft_name != "LORA":
        return config, tensors, ""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (hit := KEY.fullmatch(key)) is not None:
            factors.setdefault(hit["path"], {})[hit["factor"]] = tensor
    modules = dict(root.named_modules())
    if all(p in modules for p in factors) or any(
        len(f) < 2 or f["A"].ndim != 2 or f["B"].ndim != 2 for f in factors.values()
    ):
        return config, tensors, ""
    renamings = list(renaming_tables(root))
    there: dict[str, Pair] = {}  # linear layers, by their path here
    fused: dict[str, Cells] = {}
    for path, both in factors.items():
        pair = both["A"], both["B"]
        expert = EXPERT.fullmatch(path)
        if path in modules:
            there[path] = pair
        elif expert is not None and (owner := placed_experts(expert["owner"], modules, renamings)) is not None:
            found = part_of(expert["leaf"], "experts", modules[owner]._parameters)
            if found is None:
                return config, tensors, ""
            fused.setdefault(f"{owner}.{found[0]}", {})[int(expert["n"]), found[1]] = path, pair
        elif (new := place_keys(rename_key(path, renamings), set(modules))) is not None:
            there[new] = pair
        else:
            parent, _, leaf = path.rpartition(".")
            home = modules.get(parent)
            found = None if home is None else part_of(leaf, "linear", home._modules)
            if found is not None:
                fused.setdefault(f"{parent}.{found[0]}", {})[0, found[1]] = path, pair
            elif (apart := apart_of(path, pair, modules)) is not None:
                there |= apart
            else:
                return config, tensors, ""
    return build_tensors(runtime, config, there, fused)


def placed_experts(path: str, modules: Mapping[str, nn.Module], renamings: list[Any]) -> str | None:
    """Where a network's experts are here, if their weights are bare parameters."""
    new = rename_key(path, renamings)
    for name in (path, new, path.replace(".block_sparse_moe.", ".mlp."), path.replace(".feed_forward.", ".mlp.")):
        if name in modules and any(p in modules[name]._parameters for p in fused_parts("experts")):
            return name
    return None


def part_of(leaf: str, kind: str, fused: Mapping[str, Any]) -> tuple[str, int] | None:
    """The fused layer, of those that are there, and the number of its part that a layer's name is."""
    for name, names in fused_parts(kind).items():
        if fused.get(name) is not None:
            for i, known in enumerate(names):
                if leaf in known:
                    return name, i
    return None


def apart_of(path: str, pair: Pair, modules: Mapping[str, nn.Module]) -> dict[str, Pair] | None:
    """The parts of a fused layer's factors, where the model has them as layers of their own."""
    parent, _, leaf = path.rpartition(".")
    home = modules.get(parent)
    if home is None or leaf not in fused_parts("linear"):
        return None
    found = [next((n for n in names if n in home._modules), None) for names in fused_parts("linear")[leaf]]
    if None in found:
        return None
    rows = [output_width(modules[f"{parent}.{n}"]) for n in found]
    if sum(rows) != len(pair[1]):
        return None
    return {
        f"{parent}.{n}": (pair[0].clone(), b.clone()) for n, b in zip(found, torch.split(pair[1], rows), strict=True)
    }


def output_width(layer: nn.Module) -> int:
    """How many rows a linear layer's weight has."""
    kind = layers.kind_of(layer)
    return int(layer.out_features) if kind is None else kind.measure(layer, kind.param).fan_out  # type: ignore[arg-type]


def join_factors(
    pairs: list[tuple[str, Pair] | None], rows: list[int], scales: list[float], ranks: list[int], width: int
) -> Pair:
    """The factors of fused layers: A (sum of r, in), B (sum of out, sum of r); a part without factors adds nothing."""
    A, B = [], []
    like = next(p[1][0] for p in pairs if p is not None)
    for pair, out, scale, r in zip(pairs, rows, scales, ranks, strict=True):
        a, b = (like.new_zeros(r, width), like.new_zeros(out, r)) if pair is None else pair[1]
        A.append(a)
        B.append(b * scale)
    return torch.cat(A), torch.block_diag(*B)


def build_tensors(
    runtime: Runtime,
    config: Any,
    there: Mapping[str, Pair],
    fused: Mapping[str, Cells],
) -> tuple[Method, Mapping[str, Tensor], str]:
    """The config and the tensors of what `refitted` found."""
    if odd := [n for n in PLAIN if getattr(config, n, None)]:
        raise ValueError(
            f"the file's layers are fused here, or apart, and {odd[0]}={getattr(config, odd[0])!r} is not the same on those; "
            "load it where its layers are as they were, and turn it into a plain LoRA there (veneer.convert_to_lora)"
        )
    if config.bias != "none":
        raise ValueError(f"the file's layers are fused here, or apart, and bias={config.bias!r} has no place on those")
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    factors: dict[tuple[str, str], Tensor] = {}

    def scale_of(path: str, r: int) -> float:
        alpha = pattern_value(config.alpha_pattern or {}, path, config.lora_alpha)
        return float(alpha / (math.sqrt(r) if config.use_rslora else r))

    def note(path: str, r: int, scale: float) -> None:
        ranks[path], alphas[path] = r, scale * (math.sqrt(r) if config.use_rslora else r)

    modules = dict(runtime.root.named_modules())
    for path, (A, B) in there.items():
        note(path, len(A), scale_of(path, len(A)))
        factors[path, "A"], factors[path, "B"] = A, B
    for path, cells in fused.items():
        owner, _, leaf = path.rpartition(".")
        first = next(iter(cells.values()))
        width = first[1][0].shape[1]
        if path in modules:
            experts, fan_out, count = 1, output_width(modules[path]), len(fused_parts("linear")[leaf])
        else:
            experts, a, b = modules[owner]._parameters[leaf].shape
            fan_out, count = (a if b == width else b), len(fused_parts("experts")[leaf])
        rows = rows_of(
            [next((len(c[1][1]) for (_, i), c in cells.items() if i == k), None) for k in range(count)], fan_out, path
        )
        r = [max((len(c[1][0]) for (_, i), c in cells.items() if i == k), default=0) for k in range(count)]
        if any(len(c[1][0]) != r[i] for (_, i), c in cells.items()) or any(n >= experts for n, _ in cells):
            raise ValueError(
                f"{path}: the file has experts of several ranks, or of more than the {experts} that are here"
            )
        base = scale_of(first[0], len(first[1][0]))
        A_all, B_all = first[1][0].new_zeros(experts, sum(r), width), first[1][1].new_zeros(experts, fan_out, sum(r))
        for n in range(experts):
            pairs = [cells.get((n, i)) for i in range(count)]
            if any(p is not None for p in pairs):
                scales = [1.0 if p is None else scale_of(p[0], len(p[1][0])) / base for p in pairs]
                A_all[n], B_all[n] = join_factors(pairs, rows, scales, r, width)
        note(path, sum(r), base)
        factors[path, "A"] = A_all.flatten(0, 1)  # (experts * r, in)
        factors[path, "B"] = B_all.permute(1, 2, 0).flatten(1)  # (out, r * experts)
    fitted = config.replace(
        target_modules=[*there, *(p for p in fused if p in modules)],
        target_parameters=[p for p in fused if p not in modules] or None,
        rank_pattern={re.escape(p): r for p, r in ranks.items() if r != config.r},
        alpha_pattern={re.escape(p): a for p, a in alphas.items() if a != config.lora_alpha},
        layers_to_transform=None, layers_pattern=None, exclude_modules=None,
    )  # fmt: skip
    tensors = {}
    for place in runtime.planner("refitted", meta=True).plan_adapter(fitted).sites:
        for key in ("A", "B"):
            tensors[file_key(PREFIX, place.entry, key)] = factors[place.site.name, key]
    before = [p for cells in fused.values() for p, _ in cells.values()]
    line = (
        f"{len(before)} layers such as {before[0]} are {len(fused)} fused ones here"
        if fused
        else "layers that were fused are apart here"
    )
    return fitted, tensors, line


def rows_of(known: list[int | None], fan_out: int, path: str) -> list[int]:
    """Rows of the parts of a fused layer: those that are known, and the rest shared among the others.

    Raises:
        ValueError: they do not add up.
    """
    left, unknown = fan_out - sum(k for k in known if k is not None), known.count(None)
    if left < 0 or (unknown == 0 and left) or (unknown and left % unknown):
        raise ValueError(f"{path} has {fan_out} rows here, and the file's parts have {known}: it is of another model")
    return [left // unknown if k is None else k for k in known]
