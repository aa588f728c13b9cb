"""Which modules and bare parameters of a model a config adapts."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..backends import bare_of, linear_of, unknown_storage, unread_matrix
from .defaults import default_targets, model_type
from .query import TargetQuery
from .regex import BoundedPattern, compile_pattern
from .suggest import plain, show, suggest

ALL_LINEAR = "all-linear"
ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))
HEADS = ("score", "classifier")  # what transformers calls the head of a sequence classifier
KINDS = "Linear, Conv1D (GPT-2), Conv1d/2d/3d, Embedding and MultiheadAttention"


@dataclass(frozen=True)
class Targets:
    """What was chosen.

    Attributes:
        modules: full names, in the order of `named_modules`.
        parameters: full names of bare parameters, in the order of `named_parameters`.
        source: how they were chosen, for messages: "suffixes", "regex", "all-linear", "parameters" or
            "defaults for <model_type>".
    """

    modules: list[str]
    parameters: list[str]
    source: str


def resolve_targets(
    model: nn.Module,
    query: TargetQuery,
    *,
    supported: Callable[[nn.Module], bool],
    skip: Collection[str] = frozenset(),
    allowed: str = KINDS,
) -> Targets:
    """Find the modules and parameters that `query` names in `model`.

    Names are chosen as peft 0.21.2 chooses them, except that a choice which comes to nothing is an error, and that
    "all-linear" leaves out routers (see `all_linear`).

    Args:
        model: the base model.
        query: what the config says of its targets.
        supported: whether a module can be adapted. A named module that cannot is an error; "all-linear" passes
            over it.
        skip: names of modules to leave out, with everything below them.
        allowed: what `supported` takes, for messages.

    Raises:
        ValueError: nothing matches, or exclusion removes all that matches; a match cannot be adapted; a bad regular
            expression; no default for the architecture; layer indices that do not exist.
        TypeError: a field is neither a string nor a collection of strings; a match is a quantized layer that no
            backend reads.
    """
    spec, source = wanted_targets(model, query)
    modules = {n: m for n, m in model.named_modules() if n and ":" not in n}  # ":" marks what an adapter added
    hidden: set[str] = set()
    for name in modules if skip else ():  # a parent comes before its children
        if name in skip or name.rpartition(".")[0] in hidden:
            hidden.add(name)
    parameters = find_parameters(model, query.target_parameters, hidden)
    if spec is None or (not spec and parameters):
        return Targets([], parameters, source)

    said = f"target_modules={show(spec)}"
    if source.startswith("defaults"):
        said += f" (the {source})"
    exact: Collection[str] = ()
    lost: list[str] = []
    if spec == ALL_LINEAR:
        named = all_linear(model, modules, task=query.task_type, supported=supported)
    elif isinstance(spec, str):
        pattern = compile_pattern(spec, "target_modules")
        named = [n for n in modules if pattern.fullmatch(n)]
    else:
        exact = frozenset(spec)
        named, lost = with_suffixes(modules, exact)
    if not named:
        if parameters and source.startswith("defaults"):
            return Targets([], parameters, source)
        raise ValueError(nothing_found(said, spec, modules, supported, parameter_names(model)))
    if lost and source == "suffixes":
        text = target_hints(lost, modules, parameter_names(model))
        warnings.warn(f"target_modules: no module is named {text}", stacklevel=3)

    kept = in_layers(named, query, spec, exact)
    kept = apply_exclusions(kept, said, query.exclude_modules, modules)
    kept = not_copied(kept, said, query.modules_to_save, hidden)
    for name in kept:
        if not supported(modules[name]):
            packed = unread_matrix(modules[name])
            if packed is not None:
                raise unknown_storage(modules[name], packed, name)
            raise ValueError(
                f"{said} matches {name!r}, a {type(modules[name]).__name__}, which cannot be adapted; allowed are "
                f"{allowed}: name the layers inside it, exclude it with exclude_modules, or train it whole with "
                "modules_to_save"
            )
    return Targets(kept, parameters, source)


def wanted_targets(model: nn.Module, query: TargetQuery) -> tuple[str | Collection[str] | None, str]:
    """The config's target_modules, or the architecture's default, and where it came from.

    None stands for no module, which only `target_parameters` allows. Where `target_parameters` is given, target_modules
    None still means the default if peft has one for the architecture, as it does in peft; [] means no module.

    Raises:
        ValueError: an empty list, or no default.
        TypeError: neither a string nor a collection of strings.
    """
    spec = query.target_modules
    parameters = query.target_parameters
    if isinstance(spec, str):
        return (ALL_LINEAR, ALL_LINEAR) if spec.lower() == ALL_LINEAR else (spec, "regex")
    if spec is not None:
        check_names(spec, "target_modules")
        if not spec and not parameters:
            raise ValueError('target_modules=[]: name at least one module, or use target_modules="all-linear"')
        return spec, "suffixes"
    kind, method = model_type(model), plain(query.peft_type) or ""
    default = default_targets(method, kind, more=not parameters)
    if default is not None:
        return default, f"defaults for {kind}"
    if parameters:
        return None, "parameters"
    leaves = {n.rpartition(".")[2]: m for n, m in model.named_modules()}
    linear = [n for n, m in leaves.items() if isinstance(m, linear_kinds()) and not n.isdigit()]
    raise ValueError(
        f"target_modules=None: {method or query.asked_by} has no default for model type {kind!r}; name the "
        f'modules, such as target_modules={linear[:2] or ["q_proj", "v_proj"]!r}, or use target_modules="all-linear"'
    )


def matches(key: str, spec: str | Collection[str] | None) -> bool:
    """Whether a module's name is meant by `spec`: a regular expression for all of it, or a set of suffixes.

    A suffix consists of whole components: "proj" does not match "q_proj", "self_attn.q_proj" matches
    "layers.0.self_attn.q_proj".
    """
    if spec is None:
        return False
    if isinstance(spec, str):
        return compile_pattern(spec, "pattern").fullmatch(key) is not None
    if key in spec:
        return True
    at = key.rfind(".")
    while at >= 0:
        if key[at + 1 :] in spec:
            return True
        at = key.rfind(".", 0, at)
    return False


def with_suffixes(names: Iterable[str], entries: Collection[str]) -> tuple[list[str], list[str]]:
    """The `names` that end in one of `entries`, and the entries that none ends in: one look-up for each ending."""
    found: list[str] = []
    hit: set[str] = set()
    for name in names:
        met = len(found)
        tail, at = name, 0
        while True:
            if tail in entries:
                hit.add(tail)
                if len(found) == met:
                    found.append(name)
            at = name.find(".", at) + 1
            if not at:
                break
            tail = name[at:]
    return found, sorted(e for e in entries if e not in hit)


def all_linear(
    model: nn.Module, modules: Mapping[str, nn.Module], *, task: object, supported: Callable[[nn.Module], bool]
) -> list[str]:
    """Every linear layer that can be adapted, but for heads and routers.

    A linear layer is an nn.Linear, transformers' Conv1D, or a class with "Linear" in its name, which is what the
    quantization libraries call theirs. Left out, as in peft:

    - the output head, `model.get_output_embeddings()`;
    - in sequence classifiers without one, the head: `model.score`, else `model.classifier`.

    Left out here only:

    - routers of mixtures of experts: what is called gate, router or shared_expert_gate beside a module `experts`, and
      everything inside it, or inside any module called router. A thin layer there changes which expert a token goes
      to; and most routers in transformers 5 are bare parameters, which peft leaves out too;
    - the output projection inside nn.MultiheadAttention, which uses the weight and never calls the layer. Name it,
      or the attention, to adapt it.
    """
    kinds = linear_kinds()
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None and plain(task) == "SEQ_CLS":
        head = next((h for h in (getattr(model, n, None) for n in HEADS) if h is not None), None)
    found = []
    routers: set[str] = set()
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if parent in routers or (leaf in ROUTERS and (f"{parent}.experts" if parent else "experts") in modules):
            routers.add(name)
            continue
        if leaf == "router":
            routers.add(name)  # for what is inside it
        if module is head or isinstance(modules.get(parent), nn.MultiheadAttention):
            continue
        named = isinstance(module, kinds) or "Linear" in type(module).__name__
        # One of a library that no backend knows is among them, so that it is an error unless it is excluded.
        odd = named and unread_matrix(module) is not None
        if (named or linear_of(module) is not None) and (odd or supported(module)):
            found.append(name)
    return found


def linear_kinds() -> tuple[type, ...]:
    library = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if library is None else (nn.Linear, library.Conv1D)


def find_parameters(model: nn.Module, spec: Collection[str] | None, hidden: Collection[str] = ()) -> list[str]:
    """Full names of the parameters that `target_parameters` names by suffix, outside the modules in `hidden`.

    A tied parameter counts once for each module that owns it, as in peft.

    Raises:
        ValueError: no entry names a parameter.
        TypeError: `spec` is one string.
    """
    if not spec:
        return []
    check_names(spec, "target_parameters")
    names = parameter_names(model, hidden)
    found, lost = with_suffixes(names, frozenset(spec))
    if lost:
        text = f"no parameter is named {target_hints(lost, names)}"
        if not found:
            bare = [n for n in names if not n.endswith((".weight", ".bias"))] or names
            sample = ", ".join(dict.fromkeys(".".join(n.split(".")[-2:]) for n in bare[:200]))
            raise ValueError(
                f"target_parameters={show(spec)}: {text}; name them as model.named_parameters() does, by their last "
                f"components; there are {sample[:400] or 'none'}"
            )
        warnings.warn(f"target_parameters: {text}", stacklevel=4)
    return found


def parameter_names(model: nn.Module, hidden: Collection[str] = ()) -> list[str]:
    """Full names of all parameters of the base model outside `hidden`, tied ones under each of their names."""
    return [
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules()
        if ":" not in owner and owner not in hidden
        for name in (*(n for n, p in module._parameters.items() if p is not None), *bare_of(module))
        if ":" not in name
    ]


def in_layers(
    names: list[str], query: TargetQuery, spec: str | Collection[str] = (), exact: Collection[str] = ()
) -> list[str]:
    """Those of `names` in the layers that `layers_to_transform` counts, and those in `exact`.

    A layer's index is the first number in the name that follows the list's name, so that an expert's index is not
    taken for a layer's. The list is named by `layers_pattern` (regular expressions; the first that matches counts).
    Without one it is any component that has another before it, as in peft; a model whose layers stand first
    ("h.0.attn") has none of those, which peft refuses and Veneer takes.

    Raises:
        ValueError: an index that no name has; a pattern without indices; a regular expression in target_modules.
    """
    chosen, pattern = query.layers_to_transform, query.layers_pattern
    if chosen is None:
        if pattern:
            raise ValueError(f"layers_pattern={pattern!r} needs layers_to_transform to say which layers")
        return names
    if not isinstance(chosen, int) and not chosen:
        return names
    if isinstance(spec, str) and spec != ALL_LINEAR:
        raise ValueError(
            f"layers_to_transform={chosen!r} cannot be used with a regular expression in target_modules ({spec!r}); "
            "name the modules in a list, or the layers in the expression"
        )
    lists = [pattern] if isinstance(pattern, str) else list(pattern or ())
    forms = [compile_pattern(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", "layers_pattern", p) for p in lists if p]
    free = [n for n in names if n not in exact]  # a full name says its layer itself
    index = layer_of(free, forms or [re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")])
    if not index and not forms:
        index = layer_of(free, [re.compile(r"[^.]*\.(?P<index>\d+)\.")])
    layers = {chosen} if isinstance(chosen, int) else set(chosen)
    there = sorted(set(index.values()))
    absent = sorted(layers.difference(there))
    if absent and free:
        span = f"{there[0]} to {there[-1]}" if len(there) > 1 and there[-1] - there[0] == len(there) - 1 else there
        raise ValueError(
            f"layers_to_transform={chosen!r}: there is no layer {absent} among the targeted modules; layers are "
            f"{span or 'none'} (layers_pattern={pattern!r}, first target {free[0]!r})"
        )
    return [n for n in names if n in exact or index.get(n) in layers]


def layer_of(names: Iterable[str], forms: Iterable[re.Pattern[str] | BoundedPattern]) -> dict[str, int]:
    """Name -> index of its layer, for the names that have one."""
    found = {}
    for name in names:
        hit = next((m for m in (f.match(name) for f in forms) if m), None)
        if hit is not None:
            found[name] = int(hit["index"])
    return found


def apply_exclusions(
    names: list[str], said: str, spec: str | Collection[str] | None, modules: Mapping[str, nn.Module]
) -> list[str]:
    """`names` without those that exclude_modules means; warns of entries that name no module of the model."""
    if not spec:
        return names
    if isinstance(spec, str):
        pattern = compile_pattern(spec, "exclude_modules")
        kept = [n for n in names if not pattern.fullmatch(n)]
        if len(kept) == len(names) and not any(pattern.fullmatch(n) for n in modules):
            warnings.warn(f"exclude_modules={spec!r} matches no module, so it excludes nothing", stacklevel=4)
    else:
        check_names(spec, "exclude_modules")
        entries = frozenset(spec)
        kept = [n for n in names if not matches(n, entries)]
        if lost := with_suffixes(modules, entries)[1]:
            warnings.warn(f"exclude_modules: no module is named {target_hints(lost, modules)}", stacklevel=4)
    if names and not kept:
        raise ValueError(
            f"{said} matches {len(names)} modules such as {names[0]!r}, but exclude_modules={show(spec)} removes all; "
            "exclude less or target more"
        )
    return kept


def not_copied(names: list[str], said: str, copies: Collection[str] | None, hidden: Collection[str] = ()) -> list[str]:
    """`names` without those that `modules_to_save` trains as full copies or that are in `hidden`."""
    kept = [n for n in names if n not in hidden] if hidden else names
    if copies:
        check_names(copies, "modules_to_save")
        joined = "|".join(f"(?:{compile_pattern(c, 'modules_to_save').pattern})" for c in copies)
        copied = compile_pattern(rf"(?:^|.*\.)(?:{joined})(?:$|\..*)", "modules_to_save", show(copies))
        kept = [n for n in kept if not copied.match(n)]
    if names and not kept:
        raise ValueError(
            f"{said} matches only {names[0]!r}, which modules_to_save trains as a full copy; take it out of one of "
            "the two"
        )
    return kept


def nothing_found(
    said: str,
    spec: str | Collection[str],
    modules: Mapping[str, nn.Module],
    supported: Callable[[nn.Module], bool],
    parameters: Iterable[str],
) -> str:
    """What to say when a spec matches no module."""
    leaves = dict.fromkeys(n.rpartition(".")[2] for n, m in modules.items() if supported(m))
    named = [n for n in leaves if not n.isdigit()] or list(leaves)
    sample = f"names in this model: {', '.join(named[:16]) or 'none that can be adapted'}" + ", …" * (len(named) > 16)
    if spec == ALL_LINEAR:
        return f"{said}: the model has no linear layer that can be adapted; {sample}"
    if not isinstance(spec, str):
        return f"{said} matches no module: there is no {target_hints(sorted(spec), modules, parameters)}; {sample}"
    if near := difflib.get_close_matches(spec.lower(), [ALL_LINEAR], cutoff=0.75):
        return f"{said} matches no module; did you mean {near[0]!r}?"
    whole = compile_pattern(rf".*\.({spec})", "target_modules", spec)
    if any(whole.fullmatch(n) for n in modules):
        return (
            f"{said} matches no module: a string is a regular expression for the whole name; write it as "
            f'r"{whole.pattern}", or name endings in a list; {sample}'
        )
    hint = suggest(spec, leaves)
    return f"{said} matches no module{hint}; a string is a regular expression for the whole name; {sample}"


def target_hints(entries: Iterable[str], names: Iterable[str], parameters: Iterable[str] = ()) -> str:
    """The entries, at most five, each with the ending of `names` nearest to it, or the parameter that it names."""
    entries, names, parameters = list(entries), list(names), list(parameters)
    said = []
    for entry in entries[:5]:
        depth = entry.count(".") + 1
        bare = next((p for p in parameters if matches(p, (entry,))), None)
        if bare is not None:
            short = ".".join(bare.split(".")[-max(depth, 2) :])
            said.append(f"{entry!r} (it is a bare parameter: use target_parameters=[{short!r}])")
            continue
        tails = dict.fromkeys(".".join(n.split(".")[-depth:]) for n in names)
        said.append(f"{entry!r}{suggest(entry, (t for t in tails if not t.isdigit()))}")
    return ", ".join(said) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")


def check_names(spec: object, field: str) -> None:
    if isinstance(spec, str) or not isinstance(spec, Collection) or not all(isinstance(e, str) for e in spec):
        raise TypeError(f'{field}={spec!r}: must be a list of names, such as ["q_proj", "v_proj"]')
