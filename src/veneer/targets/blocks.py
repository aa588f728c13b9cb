"""The places of a transformer block: where its sub-layers' outputs join the residual stream.

A sub-layer computes h from the residual stream r; the block goes on with r + h, or with norm(r + h). `places.toml` says
for known model types which modules give h, get r and normalise. For others the block's forward is read: the order in
which it calls its children and adds tells the same, since a residual's sum is the only addition in it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..backends import linear_of
from ..distributed.sharding import shape_of

ROLES = ("attention", "cross_attention", "feed_forward")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "n_embed")
ATTENTION_ARGUMENTS = frozenset(
    ("attention_mask", "cache", "past_key_values", "past_key_value", "layer_past", "encoder_hidden_states", "position_embeddings")
)  # fmt: skip
ADD = "+"


@dataclass(frozen=True)
class SublayerOutput:
    """A module whose output an adapter maps, and what lies around it.

    Attributes:
        name: the module whose output is h.
        role: "attention", "cross_attention", "feed_forward", or "" for a module that a user named.
        layer: index of its block, counted through the encoder and then the decoder; -1 outside of blocks.
        block: name of the block, or "".
        residual: the module whose first input is the residual stream, or "" where it is not known.
        norm: the norm of the sum, in blocks that normalise afterwards, or "".
        width: size of h.
        fan_in: size of the sub-layer's input.
        on_norm: the place is the norm itself: `name` is `norm`.
    """

    name: str
    role: str
    layer: int
    block: str
    residual: str
    norm: str
    width: int
    fan_in: int
    on_norm: bool = False

    def at_norm(self) -> SublayerOutput:
        """The same place behind its norm."""
        return replace(self, name=self.norm, on_norm=True)


def find_sublayers(model: nn.Module) -> list[SublayerOutput]:
    """Every place in every block of a model, in the order in which the blocks run."""
    modules = {n: m for n, m in model.named_modules() if ":" not in n}
    spots: list[SublayerOutput] = []
    layer = 0
    blocks: set[str] = set()
    for name, stack in modules.items():
        if not isinstance(stack, nn.ModuleList) or name.rpartition(".")[0] in blocks:
            continue
        kind, config = nearest_config(modules, name)
        for i, block in enumerate(stack):
            found = roles_of(block, kind, config)
            at = f"{name}.{i}" if name else str(i)
            for role, (out, residual, norm) in found.items():
                width = width_of(block, (norm, residual), out, config)
                after = f"{at}.{norm}" if norm else ""
                spots.append(SublayerOutput(f"{at}.{out}", role, layer, at, f"{at}.{residual}", after, width, width))
            if found:
                blocks.add(at)
                layer += 1
    return spots


def sublayer_at(model: nn.Module, name: str, known: Mapping[str, SublayerOutput]) -> SublayerOutput:
    """The place that a module's name means: one in a block, or the module's output as such.

    Raises:
        ValueError: the size of the module's output is not known.
    """
    if name in known:
        return known[name]
    module = model.get_submodule(name)
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    layer = int(numbers[0]) if numbers else -1
    sizes = measured_sizes(module)
    if sizes is None:
        _, config = nearest_config(dict(model.named_modules()), name)
        width = config_width(config)
        inside = [measured_sizes(m) for m in module.modules() if m is not module]
        last = next((s for s in reversed(inside) if s is not None), None)
        sizes = (width, width) if width else None if last is None else (last[1], last[1])
    if sizes is None:
        raise ValueError(
            f"target_modules: the width of {name!r} ({type(module).__name__}) is not known; name a linear layer, a norm "
            "or a module with linear layers in it"
        )
    return SublayerOutput(name, "", layer, "", "", "", sizes[1], sizes[0])


def nearest_config(modules: Mapping[str, nn.Module], name: str) -> tuple[str | None, Any]:
    """Model type and config of the innermost model around a module."""
    while True:
        config = getattr(modules[name], "config", None) if name in modules else None
        kind = getattr(config, "model_type", None)
        if kind is not None:
            return str(kind), config
        if not name:
            return None, config
        name = name.rpartition(".")[0]


def config_width(config: object) -> int:
    found = (getattr(config, f, None) for f in WIDTHS)
    return next((w for w in found if isinstance(w, int)), 0)


def measured_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Sizes (in, out) of a layer that says them, or of a norm."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return 0, module.embedding_dim
    if (packed := linear_of(module)) is not None:
        return packed[1:]
    weight = module._parameters.get("weight")
    shape = () if weight is None else shape_of(weight)
    if len(shape) == 1:
        return shape[0], shape[0]
    return (shape[0], shape[1]) if len(shape) == 2 and type(module).__name__ == "Conv1D" else None


def width_of(block: nn.Module, norms: tuple[str, ...], out: str, config: object) -> int:
    """Size of the residual stream: of a norm of it, of the layer that feeds it, or as the config says."""
    for path in norms:
        weight = block.get_submodule(path)._parameters.get("weight") if path else None
        shape = () if weight is None else shape_of(weight)
        if len(shape) == 1:
            return shape[0]
    module = block.get_submodule(out)
    if (width := config_width(config)) and measured_sizes(module) is None:
        return width
    sizes = measured_sizes(module) or next(
        (s for s in map(measured_sizes, reversed(list(module.modules()))) if s is not None), None
    )
    return width if sizes is None else sizes[1]


# The table.


@functools.cache
def places_table() -> dict[str, Any]:
    """The content of places.toml."""
    import tomllib

    with open(Path(__file__).with_name("places.toml"), "rb") as file:
        return tomllib.load(file)


def roles_of(block: nn.Module, kind: str | None, config: object) -> dict[str, tuple[str, str, str]]:
    """Role -> (out, residual, norm), names below the block; empty where the module is no block."""
    entries = places_table()
    names = {n for n, _ in block.named_modules() if n and ":" not in n}
    if kind in entries:
        return listed_roles(entries[kind], names, config)
    for entry in entries.values():
        found = listed_roles(entry, names, config) if entry.get("shape") else {}
        if found:
            return found
    return read_roles(block)


def listed_roles(entry: Mapping[str, Any], names: set[str], config: object) -> dict[str, tuple[str, str, str]]:
    """The roles that a table's entry finds among the names in a block."""
    switch = dict(entry.get("switch", {}))
    if other := switch.pop("use", None):
        if all(getattr(config, field, None) == value for field, value in switch.items()):
            return listed_roles(places_table()[other], names, config)
    if "like" in entry:
        return listed_roles(places_table()[entry["like"]], names, config)
    found = {}
    for role in ROLES:
        forms = entry.get(role, [])
        for form in [forms] if isinstance(forms, dict) else forms:
            if all(path in names for path in form.values()):
                found[role] = (form["out"], form["residual"], form.get("norm", ""))
                break
    return found


# Reading a block's forward.


def read_roles(block: nn.Module) -> dict[str, tuple[str, str, str]]:
    """The roles in a block of no listed kind, from the order in which its forward calls its children and adds.

    N a norm, A an attention, F any other child with parameters, + an addition:
        N A + N F +         normalises before:    Llama, GPT-2
        N A N + N F N +     and afterwards, inside the sub-layer: Gemma 2
        N A F + +           both from one norm:   Phi, GPT-J
        A N + F N +         only inside:          OLMo 2
        A + N F + N         normalises the sum:   BART
    Anything else, and a child called twice, is not understood: no roles.
    """
    children = {n: m for n, m in block._modules.items() if m is not None}
    calls = [e for e in forward_events(type(block), children) if e == ADD or e in children]
    kinds = {n: sort_of(m, n) for n, m in children.items()}
    counts = {n: calls.count(n) for n in children}
    if any(counts[n] > 1 for n in calls if n != ADD and kinds[n] in "NA"):
        return {}
    # Cut behind each addition.
    parts: list[list[str]] = [[]]
    adds: list[int] = []  # additions that follow each part at once
    for call in calls:
        if call == ADD:
            if parts[-1]:
                parts.append([])
                adds.append(1)
            elif adds:
                adds[-1] += 1
        else:
            parts[-1].append(call)
    tail = parts.pop()
    solid = [[c for c in p if kinds[c] in "NAF"] for p in parts]
    if not solid or not any(kinds[c] == "A" for p in solid for c in p) or not solid[0]:
        return {}
    after = kinds[solid[0][0]] != "N" and [kinds[c] for c in tail if kinds[c] != "D"] == ["N"]
    found: dict[str, tuple[str, str, str]] = {}
    for i, part in enumerate(solid):
        rest = list(part)
        leading = []
        while rest and kinds[rest[0]] == "N":
            leading.append(rest.pop(0))
        if not rest:
            return {}
        norm = ""
        if after:
            following = [c for c in (solid[i + 1] if i + 1 < len(solid) else tail) if kinds[c] != "D"]
            if not following or kinds[following[0]] != "N" or len(leading) != (i > 0):
                return {}
            norm = following[0]
        groups = [rest]
        first = next((k for k, c in enumerate(rest) if kinds[c] == "A"), None)
        if first is not None and adds[i] > 1 and first + 1 < len(rest):
            groups = [rest[: first + 1], rest[first + 1 :]]  # attention and feed-forward side by side
        for group in groups:
            attention = next((c for c in group if kinds[c] == "A"), None)
            if attention is not None and any(
                c != attention and kinds[c] in "AF" and not scales_output(children[c]) for c in group
            ):
                return {}
            role = (
                "feed_forward"
                if attention is None
                else "attention"
                if not is_cross_attention(attention, found)
                else "cross_attention"
            )
            if role in found:
                return {}
            out = group[-1]
            if group is rest:  # a dropout of its own behind the sub-layer is the last to touch h
                last = parts[i][-1]
                out = (
                    last if kinds[last] == "D" and counts[last] == 1 and isinstance(children[last], nn.Dropout) else out
                )
            residual = leading[0] if leading and not after else group[0]
            found[role] = (out, residual, norm)
    return found


def scales_output(module: nn.Module) -> bool:
    """Whether a module has vectors only, as a layer scale has."""
    return all(p.ndim < 2 for p in module.parameters())


def is_cross_attention(name: str, found: Mapping[str, Any]) -> bool:
    return "cross" in name.lower() or name.startswith(("encoder_attn", "encoder_decoder")) or "attention" in found


def sort_of(module: nn.Module, name: str) -> str:
    """N for a norm, A for an attention, D for what has no parameters, F for the rest."""
    kind = type(module).__name__
    if "Norm" in kind:
        return "N"
    if not any(True for _ in module.parameters()):
        return "D"
    if "attention" in kind.lower() or "attn" in f"{kind} {name}".lower():
        return "A"
    return "A" if ATTENTION_ARGUMENTS & set(inspect.signature(module.forward).parameters) else "F"


def forward_events(cls: type, children: Mapping[str, nn.Module]) -> list[str]:
    """Names of the children that a class's forward calls, and its additions, in the order of evaluation."""
    base: type = getattr(cls, "_veneer_base", cls)
    return list(_walk_ast(body_of(base.forward), base, children, 0))  # type: ignore[attr-defined]


def body_of(function: Callable[..., Any]) -> ast.AST | None:
    """The syntax tree of a function, or None where its source is not at hand."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


def _walk_ast(node: ast.AST | None, cls: type, children: Mapping[str, nn.Module], depth: int) -> Iterator[str]:
    if node is None:
        return
    if isinstance(node, ast.Call):
        for part in (*node.args, *(k.value for k in node.keywords)):
            yield from _walk_ast(part, cls, children, depth)
        yield from _walk_ast(node.func, cls, children, depth)
        return
    if isinstance(node, ast.Assign):  # the value comes before the target
        yield from _walk_ast(node.value, cls, children, depth)
        return
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        helper = getattr(cls, node.attr, None)
        if node.attr in children:
            yield node.attr
        elif inspect.isfunction(helper) and depth < 2:  # a part of the forward in a method of its own
            yield from _walk_ast(body_of(helper), cls, children, depth + 1)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk_ast(child, cls, children, depth)
    adds = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    if adds and not isinstance(node.left, ast.Tuple) and not isinstance(node.right, ast.Tuple):  # type: ignore[attr-defined]
        yield ADD
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and not isinstance(node.value, ast.Tuple):
        yield ADD
