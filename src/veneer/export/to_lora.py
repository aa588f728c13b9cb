"""Any adapter that changes weights, as a LoRA: the change L (W R + Delta) - W of each weight, cut off at a rank.

A truncated singular value decomposition is the best approximation of its rank (Eckart & Young 1936); it is exact where
the change has no higher rank, as VeRA's and a thin LoHa's where that suffices.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.hadamard import Hadamard
from ..algebra.low_rank import Factored, best_rank, low_rank
from ..algebra.recursion import Term
from ..algebra.sums import terms_of
from ..distributed import sharding
from ..files import adapter_files
from ..injection.entries import AdaptedSite, copy_name, term_of
from ..lifecycle.adapters import Runtime
from ..lifecycle.keys import PREFIX, file_key
from ..methods.base import Method
from ..methods.lora import LoraConfig

Parts = tuple[Tensor, ...]  # M (n, out / n, in), or B (n, out / n, k) and A (n, k, in); n experts or groups


@dataclass(frozen=True)
class Quality:
    """How well one layer is approximated.

    Attributes:
        rank: of the LoRA there.
        error: Frobenius norm of what is cut off, relative to that of the change of the weight; 0 to 1.
    """

    rank: int
    error: float


class Converted(tuple[LoraConfig, dict[str, Tensor]]):
    """A LoRA's config and its tensors by their key in the file, as a pair; `quality` has one entry a layer, by name."""

    quality: dict[str, Quality]

    def __new__(cls, config: LoraConfig, tensors: dict[str, Tensor], quality: dict[str, Quality]) -> Converted:
        made = super().__new__(cls, (config, tensors))
        made.quality = quality
        return made

    @property
    def error(self) -> float:
        """The largest relative error of a layer."""
        return max((q.error for q in self.quality.values()), default=0.0)


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Converted:
    """The LoRA that is nearest to an adapter, for every method that maps weights linearly; the model stays as it is.

    Its scale is 1. Biases that the adapter changes are carried over exactly (`bias="lora_only"`), and so are full copies of
    modules and trained token rows.

    Args:
        model: a PeftModel, or a model that is adapted in place.
        rank: an int, the rank of every layer; or a float in (0, 1], the fraction of each layer's squared singular values
            that its rank is to keep.
        adapter_name: the adapter.
        progressbar: show the progress over layers.
        compile_kwargs: arguments for `torch.compile` of the decomposition; None does not compile.

    Returns:
        A pair of the `LoraConfig` and the tensors by their key in the file, with the attribute `quality`: rank and relative
        error of each layer.

    Raises:
        TypeError: the method acts on activations, or on weights that no LoRA can name; or the model is sharded.
        ValueError: a rank out of range, or above what a layer has.
    """
    check_rank(rank)
    runtime = adapter_files.runtime_on(model)
    config: Any = runtime.config_of(adapter_name)
    prefix = adapter_files.prefix_of(model)
    compute: Callable[..., Any] = (
        decompose_change if compile_kwargs is None else torch.compile(decompose_change, **compile_kwargs)
    )
    sites = [s for s in runtime.places[adapter_name] if type(s.entries[adapter_name].method) is type(config)]
    if isinstance(config, LoraConfig) and not config.use_dora and isinstance(rank, int) and rank >= config.largest:
        warnings.warn(f"adapter {adapter_name!r} is a LoRA of rank {config.largest} already", stacklevel=2)
    for site in sites:
        refuse_conversion(site, adapter_name)
    tensors: dict[str, Tensor] = {}
    quality: dict[str, Quality] = {}
    biases: dict[str, tuple[Tensor, bool]] = {}  # key in the file -> bias, and whether the adapter changes it
    for site in show_names(sites) if progressbar else sites:
        with torch.no_grad(), sharding.gathered_in_place(site.owner._parameters.values()):
            parts, bias = weight_change(site, adapter_name)
            B, A, kept = cut_rank(site, parts, rank, compute)
        entry = site.entries[adapter_name]
        made = LoraConfig().unstacked(B / site.low_rank_factor, A, site)
        dtype = next(iter(site.parameters(adapter_name).values())).dtype
        names = LoraConfig().file_names(site)
        for key, value in made.items():
            tensors[f"{prefix}{entry.key}.{names[key]}"] = value.to(dtype).contiguous()
        if bias is not None and site.kind.bias == "bias":
            changed = not torch.equal(bias, site.bias.to(bias))  # type: ignore[union-attr]
            biases[f"{prefix}{entry.key}.{names['bias']}"] = (bias.to(dtype), changed)
        quality[site.name] = kept
    trained = "all" if getattr(config, "bias", "none") == "all" else "lora_only"
    trains = trained == "all" or any(changed for _, changed in biases.values())
    if trains:
        tensors |= {key: bias for key, (bias, _) in biases.items()}
    tensors |= carry_over(runtime, adapter_name, prefix)
    lora = describe_conversion(runtime, config, sites, quality, rank)
    lora.bias = trained if trains else "none"
    return Converted(lora, tensors, quality)


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> Converted:
    """Write what `convert_to_lora` makes to a folder, in peft's layout; arguments, errors and result are its own."""
    made = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    prefix = "" if adapter_files.prefix_of(model) else PREFIX  # files have it also where the model was adapted in place
    adapter_files.write_adapter(
        adapter_files.runtime_on(model), made[0], {f"{prefix}{k}": t for k, t in made[1].items()}, path
    )
    return made


def check_rank(rank: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ValueError(f"rank={rank!r}: must be a whole number, or a fraction in (0, 1] of the energy to keep")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"rank={rank!r}: a float is the fraction of the squared singular values to keep and must be in (0, 1]; give an "
            "int for a fixed rank"
        )
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank={rank!r}: must be 1 or more")


def check_convertible(runtime: Runtime, adapter: str) -> bool:
    """Whether an adapter makes changes of matrices and nothing else, but for full copies, rows and biases."""
    config = runtime.config_of(adapter)
    try:
        for site in runtime.places[adapter]:
            if type(site.entries[adapter].method) is type(config):
                refuse_conversion(site, adapter)
    except TypeError:
        return False
    return True


def refuse_conversion(site: AdaptedSite, adapter: str) -> None:
    """Raise TypeError where an adapter says more at a site than a change of a matrix that LoRA can name."""
    method = site.entries[adapter].method
    split = next((p for p in site.owner._parameters.values() if p is not None and sharding.is_distributed(p)), None)
    if split is not None:
        raise TypeError(
            f"{site.name}: its weights are sharded by {sharding.sharding_name(split)}; save the adapter and convert it in one process, with "
            "veneer convert"
        )
    if site.backend is None or method.acts_on == "stacks" or "post" in method.hooks:
        raise TypeError(
            f"adapter {adapter!r} ({method.peft_name}) acts on activations and makes no change of a weight; no LoRA equals it"
        )
    if site.kind.by_parameter and site.fan_in == 1:
        raise TypeError(
            f"{site.name}: adapter {adapter!r} ({method.peft_name}) trains a vector, which is no matrix that LoRA can "
            "factor; keep this adapter as it is, or merge it into the model"
        )


def weight_change(site: AdaptedSite, adapter: str) -> tuple[Parts, Tensor | None]:
    """By what an adapter changes a weight, as factors where it has them, and the bias it leaves (out,)."""
    said = term_of(site.entries[adapter].method, site.tensors(adapter), site)
    n = site.experts or site.groups
    wide = torch.float64 if site.home.type in ("cpu", "cuda") else torch.float32
    bias = None if site.bias is None else site.bias.to(device=site.home, dtype=wide)
    if said.left is not None or said.shift is not None:
        beside = torch.zeros(site.fan_out, 1, dtype=wide, device=site.home)  # in place of the weight
        _, bias = site.kind.compose(site, [Term(None, said.left, None, said.shift, None)], beside, bias)
    if said.left is None and said.right is None:
        delta = [t.factored() if isinstance(t, Hadamard) and t.thin else t for t in terms_of(said.delta)]
        if all(isinstance(t, Factored) and t.size == site.patch for t in delta):
            pairs = [stack_experts(t, n, wide) for t in delta if isinstance(t, Factored)]
            return (torch.cat([B for B, _ in pairs], -1), torch.cat([A for _, A in pairs], -2)), bias
    weight = site.weight().to(device=site.home, dtype=wide)
    changed, _ = site.kind.compose(site, [Term(said.delta, said.left, said.right, None, None)], weight, None)
    return ((changed - weight).reshape(n, -1, weight.shape[-1]),), bias


def stack_experts(op: Factored, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B (n, out / n, k) and A (n, k, in) of an operator, its scales in B and A."""
    if op.B.ndim == 3:
        return op.B.to(dtype) * op.scale, op.A.to(dtype)
    B, A = op.grouped(dtype)
    if B.shape[0] == n:
        return B, A
    return B.reshape(n, -1, B.shape[-1]), A.expand(n, -1, -1)  # an operator that crosses the groups


def decompose_change(parts: Parts, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r factors of a change, and its singular values; see `low_rank`."""
    if len(parts) == 2:
        return low_rank(*parts, r)
    return best_rank(parts[0].float(), r)  # the difference was taken in float64; its factors need no more than float32


def cut_rank(
    site: AdaptedSite, parts: Parts, rank: float, compute: Callable[..., Any]
) -> tuple[Tensor, Tensor, Quality]:
    """A site's change at the rank that is asked for: factors (n, out / n, r) and (n, r, in), and how good they are."""
    groups = site.groups
    full = min(parts[0].shape[-2], parts[-1].shape[-1])  # the most that singular values can be
    if isinstance(rank, int):
        if rank % groups:
            raise ValueError(
                f"{site.name}: rank={rank} does not divide into the {groups} groups of this convolution; choose a multiple"
            )
        r = rank // groups
        if r > full:
            raise ValueError(
                f"{site.name}: rank={rank} is above what this layer's change can have, {full * groups}; choose a smaller "
                "rank, or a float for ranks by layer"
            )
    else:
        r = full
    B, A, s = compute(parts, r)
    energy = s.double().square().reshape(-1, s.shape[-1]).sum(0)  # (k,), of all stacks
    total = float(energy.sum())
    if isinstance(rank, float):
        r = min(int(torch.searchsorted(energy.cumsum(0), rank * total)) + 1, full) if total else 1
        B, A = B[..., :r], A[..., :r, :]
    left = float(energy[r:].sum())
    return B, A, Quality(r * groups, math.sqrt(left / total) if total else 0.0)


def carry_over(runtime: Runtime, adapter: str, prefix: str) -> dict[str, Tensor]:
    """The adapter's tensors that are no change of a matrix: full copies, token rows, further biases."""
    found: dict[str, Tensor] = {}
    kind = type(runtime.config_of(adapter))
    for site in runtime.places[adapter]:
        entry = site.entries[adapter]
        if site.kind.whole:
            copied = runtime.layers[site.name]._modules[copy_name(adapter)]
            assert copied is not None
            found |= {f"{prefix}{entry.key}.{k}": v for k, v in copied.state_dict().items()}
        elif type(entry.method) is not kind and entry.saved:
            found |= {file_key(prefix, entry, k): p for k, p in site.parameters(adapter).items()}
    with sharding.gathered_in_place(found.values()):
        return {k: adapter_files.copy_to_host(v) for k, v in found.items()}


def describe_conversion(
    runtime: Runtime, config: object, sites: Iterable[AdaptedSite], quality: Mapping[str, Quality], rank: float
) -> LoraConfig:
    """The LoRA's config: its layers by name, and their ranks where they differ."""
    r = rank if isinstance(rank, int) else 1
    others = {name: q.rank for name, q in quality.items() if q.rank != r or isinstance(rank, float)}
    modules = {s.key for s in sites if not s.kind.by_parameter and ".base_layer." not in s.key}
    parameters = [s.name for s in sites if s.kind.by_parameter]
    kept = {f: getattr(config, f) for f in COMMON if getattr(config, f, None) is not None}
    lora = LoraConfig(
        **kept,
        r=r,
        lora_alpha=r,
        target_modules=shorten_names(modules, runtime.root) if modules else None,
        target_parameters=parameters or None,
        rank_pattern=others,
        alpha_pattern=dict(others),
    )
    lora.fan_in_fan_out = any(s.kind.name == "Conv1D" for s in sites)
    return lora


COMMON = (*(f.name for f in fields(Method) if f.name != "peft_type"), "modules_to_save", "trainable_token_indices")


def shorten_names(names: set[str], root: nn.Module) -> set[str]:
    """The fewest suffixes that name exactly these modules: last components that no other module has, else whole names."""
    others = {n.rpartition(".")[2] for n, _ in root.named_modules() if n not in names}
    short = {leaf for n in names if (leaf := n.rpartition(".")[2]) not in others and not leaf.isdigit()}
    return short | {n for n in names if n.rpartition(".")[2] not in short}


def show_names(sites: list[AdaptedSite]) -> Iterable[AdaptedSite]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    found: Iterable[AdaptedSite] = tqdm(sites, desc="converting to LoRA")
    return found
