"""Which modules and bare parameters of a model a config adapts."""

from __future__ import annotations

import difflib
import functools
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
ALL_LINEAR = "all-linear"
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Targets:
    """What was chosen.

    Attributes:
        modules: full names, in the model's order.
        parameters: full names of bare parameters, in the model's order.
        source: how they were chosen, for messages.
    """

    modules: list[str]
    parameters: list[str]
    source: str


def resolve(
    model: nn.Module, config: Any, *, supported: Callable[[nn.Module], bool], skip: Collection[str] = frozenset()
) -> Targets:
    """Find the modules and parameters that `config` names in `model`.

    Args:
        model: the base model.
        config: anything with `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
            `target_parameters` and `peft_type`; a missing attribute counts as None.
        supported: whether a module can be adapted.
        skip: names of modules to leave out, with everything below them.

    Raises:
        ValueError: nothing matches, a match cannot be adapted, a bad regular expression, no default for the
            architecture, or layer indices that do not exist.
    """
    spec, source = wanted(model, config)
    parameters = find_parameters(model, getattr(config, "target_parameters", None))
    modules = {n: m for n, m in model.named_modules() if n and ":" not in n}
    below = tuple(f"{s}." for s in skip)
    free = {n for n in modules if n not in skip and not n.startswith(below)} if skip else set(modules)
    if spec == ALL_LINEAR:
        named = [n for n in all_linear(model, modules) if n in free]
    elif spec is None or (not spec and parameters):
        named = []
    else:
        named = [n for n in modules if n in free and matches(n, spec)]
        if not named:
            raise ValueError(nothing(spec, modules, free))
        report_unmatched(spec, modules)
    kept = excluded(named, getattr(config, "exclude_modules", None), modules)
    kept = in_layers(kept, config)
    if named and not kept:
        raise ValueError(
            f"target_modules={show(spec)} matches {named[0]!r} and others, but exclude_modules removes all"
        )
    if not kept and not parameters:
        raise ValueError(f"target_modules={show(spec)} matches no module of {type(model).__name__}")
    for name in kept:
        if not supported(modules[name]):
            raise ValueError(
                f"target_modules={show(spec)} matches {name!r}, a {type(modules[name]).__name__}, which cannot be "
                "adapted; allowed are Linear, Conv1D (GPT-2), Conv1d/2d/3d, Embedding and MultiheadAttention: name the "
                "layers inside it, exclude it with exclude_modules, or train it whole with modules_to_save"
            )
    return Targets(kept, parameters, source)


def wanted(model: nn.Module, config: Any) -> tuple[str | Collection[str] | None, str]:
    """The config's target_modules, or the architecture's default, and where it came from."""
    spec = getattr(config, "target_modules", None)
    if isinstance(spec, str):
        if spec.lower() == ALL_LINEAR:
            return ALL_LINEAR, ALL_LINEAR
        check_pattern(spec, "target_modules")
        return spec, "regex"
    if spec is not None:
        if not spec and not getattr(config, "target_parameters", None):
            raise ValueError('target_modules=[]: name at least one module, or use target_modules="all-linear"')
        return spec, "suffixes"
    if getattr(config, "target_parameters", None):
        return None, "parameters"
    kind, method = model_type(model), str(getattr(config, "peft_type", ""))
    default = default_targets(method, kind)
    if default is None:
        raise ValueError(
            f"target_modules=None: {method or type(config).__name__} has no default for model type {kind!r}; name the "
            'modules, such as target_modules=["q_proj", "v_proj"], or use target_modules="all-linear"'
        )
    return default, f"defaults for {kind}"


def matches(key: str, spec: str | Collection[str] | None) -> bool:
    """Whether a module's name is meant by `spec`: a regular expression for all of it, or a set of suffixes.

    A suffix consists of whole components: "proj" does not match "q_proj", "self_attn.q_proj" matches
    "layers.0.self_attn.q_proj".
    """
    if spec is None:
        return False
    if isinstance(spec, str):
        return re.fullmatch(spec, key) is not None
    if key in spec:
        return True
    at = key.rfind(".")
    while at >= 0:
        if key[at + 1 :] in spec:
            return True
        at = key.rfind(".", 0, at)
    return False


def all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Every linear layer, but for those that would change what the model computes rather than how.

    Left out: the output head (`get_output_embeddings`); routers of mixtures of experts, which are linear layers
    called gate or router beside `experts`, or anything inside a module called router; and the output projection
    inside nn.MultiheadAttention, whose forward is never called. A new classification head is left out because the
    task types train it as a full copy.
    """
    library = sys.modules.get("transformers.pytorch_utils")
    kinds: tuple[type, ...] = (nn.Linear,) if library is None else (nn.Linear, library.Conv1D)
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    found = []
    for name, module in modules.items():
        if not isinstance(module, kinds) or module is head:
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf in ROUTERS and f"{parent}.experts" in modules:
            continue
        if "router" in parent.split(".") or isinstance(modules.get(parent), nn.MultiheadAttention):
            continue
        found.append(name)
    return found


def find_parameters(model: nn.Module, spec: Collection[str] | None) -> list[str]:
    """Full names of the parameters that `target_parameters` names by suffix."""
    if not spec:
        return []
    names = [n for n, _ in model.named_parameters() if ":" not in n]
    found = [n for n in names if matches(n, set(spec))]
    for entry in spec:
        if not any(matches(n, {entry}) for n in found):
            bare = {".".join(n.split(".")[-2:]) for n in names}
            raise ValueError(
                f"target_parameters: no parameter is named {entry!r}{suggest(entry, bare)}; name them as in "
                f"model.named_parameters(), for instance {min(bare)!r}"
            )
    return found


def excluded(names: list[str], spec: str | Collection[str] | None, modules: Mapping[str, Any]) -> list[str]:
    """`names` without those that exclude_modules means; warns of entries that mean nothing."""
    if not spec:
        return names
    if isinstance(spec, str):
        check_pattern(spec, "exclude_modules")
    kept = [n for n in names if not matches(n, spec)]
    if len(kept) == len(names):
        warnings.warn(f"exclude_modules={show(spec)} excludes nothing that was targeted", stacklevel=2)
    return kept


def in_layers(names: list[str], config: Any) -> list[str]:
    """Those of `names` in the layers that `layers_to_transform` counts."""
    chosen = getattr(config, "layers_to_transform", None)
    pattern = getattr(config, "layers_pattern", None)
    if chosen is None or chosen == []:
        if pattern:
            raise ValueError(f"layers_pattern={pattern!r} needs layers_to_transform to say which layers")
        return names
    if isinstance(getattr(config, "target_modules", None), str) and config.target_modules.lower() != ALL_LINEAR:
        raise ValueError("layers_to_transform cannot be used with a regular expression in target_modules; use a list")
    wanted_layers = {chosen} if isinstance(chosen, int) else set(chosen)
    patterns = [pattern] if isinstance(pattern, str) and pattern else list(pattern or [r"[^.]*"])
    # The first number in the name counts, so that an expert's index is not taken for a layer's.
    forms = [re.compile(rf"(?:^|.*?\.){p}\.(\d+)\.") for p in patterns]
    indices = {}
    for name in names:
        hit = next((m for m in (f.match(name) for f in forms) if m), None)
        if hit:
            indices[name] = int(hit.group(1))
    absent = wanted_layers - set(indices.values())
    if absent:
        there = sorted(set(indices.values()))
        span = f"{there[0]} to {there[-1]}" if there else "none"
        raise ValueError(
            f"layers_to_transform={chosen!r}: there is no layer {sorted(absent)} among the targeted modules; layers are "
            f"{span} (layers_pattern={pattern!r})"
        )
    return [n for n in names if indices.get(n) in wanted_layers]


def report_unmatched(spec: str | Collection[str], modules: Mapping[str, Any]) -> None:
    """Warn of entries of a list that name no module."""
    if isinstance(spec, str):
        return
    leaves = {n.rpartition(".")[2] for n in modules}
    lost = [e for e in sorted(spec) if e not in leaves and not any(matches(n, {e}) for n in modules)]
    if lost:
        hints = ", ".join(f"{e!r}{suggest(e, leaves)}" for e in lost)
        warnings.warn(f"target_modules: no module is named {hints}", stacklevel=3)


def nothing(spec: str | Collection[str], modules: Mapping[str, Any], free: Collection[str]) -> str:
    """What to say when a spec matches no module."""
    hidden = [n for n in modules if n not in free and matches(n, spec)]
    if hidden:
        return (
            f"target_modules={show(spec)} matches only {hidden[0]!r}, which modules_to_save trains as a full copy; take "
            "it out of one of the two"
        )
    leaves = sorted({n.rpartition(".")[2] for n in modules if not n.rpartition(".")[2].isdigit()})
    hint = "" if isinstance(spec, str) else "".join(suggest(e, leaves) for e in sorted(spec)[:3])
    return f"target_modules={show(spec)} matches no module{hint}; names in this model: {', '.join(leaves[:24])}"


def check_pattern(pattern: str, field: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}={pattern!r} is no valid regular expression: {error}") from error


def show(spec: object) -> str:
    return repr(sorted(spec) if isinstance(spec, (set, frozenset)) else spec)


def model_type(model: nn.Module) -> str | None:
    """The architecture, as `model.config.model_type` says it, or None."""
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return None if found is None else str(found)


@functools.cache
def defaults() -> dict[str, dict[str, Any]]:
    """The table of defaults, each method's own with what it takes over from another filled in."""
    with open(Path(__file__).with_name("defaults.toml"), "rb") as file:
        table: dict[str, dict[str, Any]] = tomllib.load(file)
    for name, own in table.items():
        like = own.pop("like", None)
        if like is not None:
            table[name] = {**table[like], **own}
    return table


def default_targets(method: str, kind: str | None) -> list[str] | str | None:
    """Default target_modules of a method (its peft_type) for an architecture, or None."""
    if kind is None:
        return None
    found: list[str] | str | None = defaults().get(method.lower(), {}).get(kind)
    return found


def default_feedforward(kind: str | None) -> list[str] | None:
    """Default feedforward_modules of (IA)^3 for an architecture, or None."""
    found: list[str] | None = defaults()["ia3_feedforward"].get(kind or "")
    return found


def pattern_value(patterns: Mapping[str, T], key: str, default: T) -> T:
    """Value of the first pattern that matches a module's name, as a regular expression for its last components."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def suggest(value: str, candidates: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest candidate, or an empty string."""
    near = difflib.get_close_matches(value, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
