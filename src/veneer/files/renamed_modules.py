"""Files of other releases of transformers: where a module had another path, its adapter's tensors are brought to the new one.

transformers keeps the tables itself, by model type: they bring checkpoints of earlier layouts to the modules of today
(`language_model.model.layers` became `model.language_model.layers` in llava, `block_sparse_moe` became `mlp` in Mixtral).
The same renamings hold for what was trained on those modules.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..lifecycle.keys import PREFIX
from ..methods.base import Method
from ..methods.registry import registry


def strange_paths(tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Paths that keys of an adapter's tensors name, and that no module or parameter of the model has."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    return sorted({path for key in tensors if (path := module_of(key)) is not None and path not in known})


def translate_keys(
    tensors: Mapping[str, Tensor], model: nn.Module, strange: Sequence[str]
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """An adapter's tensors under the paths that its modules have here.

    Args:
        tensors: by their keys in the file.
        model: the base model.
        strange: the paths that are not there, of `strange_paths`.

    Returns:
        The tensors, and old path -> new path of the modules that had another one; nothing if no renaming leads to a module
        that is there.
    """
    modules = {name for name, _ in model.named_modules()}
    renamings = list(renaming_tables(model))
    moved: dict[str, str] = {}
    for path in strange if renamings else ():
        new = place_keys(rename_key(path, renamings), modules)
        if new is not None:
            moved[path] = new
    if not moved:
        return tensors, {}
    found = {}
    for key, tensor in tensors.items():
        path = module_of(key) or ""
        found[PREFIX + moved[path] + key[len(PREFIX) + len(path) :] if path in moved else key] = tensor
    if len(found) < len(tensors):
        return tensors, {}  # two keys would become one: then it is another layout
    return found, moved


def with_new_names(config: Method, moved: Mapping[str, str]) -> Method:
    """The config with the new paths of the modules that it names by more than their last component."""
    changes: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        given = vars(config).get(field)
        if given and not isinstance(given, str):
            changes[field] = list(dict.fromkeys(new for name in given for new in _new_names(name, moved)))
    return config.replace(**{k: v for k, v in changes.items() if set(v) != set(vars(config)[k])})


def _new_names(name: str, moved: Mapping[str, str]) -> list[str]:
    """The paths that the modules named by a suffix of their old path have now; the suffix, if it still means them."""
    meant = {new for old, new in moved.items() if f".{old}".endswith(f".{name}")}
    return [name] if all(f".{new}".endswith(f".{name}") for new in meant) else sorted(meant)


@functools.cache
def own_components() -> frozenset[str]:
    """First components of the names that methods give their tensors below a module: "lora_A", "adapter_down"."""
    names = {n.partition(".")[0] for cls in registry().values() for t in cls.tensors.values() for n in t.names}
    return frozenset(names | {c for cls in registry().values() for c in cls.components}) - {"weight", "bias"}


def module_of(key: str) -> str | None:
    """The path of the module that a key is of, or None if it is of none.

    What no method names as its own is a parameter: of a module that is trained whole, or a bias.
    """
    if not key.startswith(PREFIX):
        return None
    parts = key.removeprefix(PREFIX).split(".")
    first = next((n for n, part in enumerate(parts) if part in own_components()), len(parts) - 1)
    return ".".join(parts[:first]) or None


def place_keys(path: str, modules: set[str]) -> str | None:
    """A path that is there: as it is, or without one component, as those of models within models."""
    parts = path.split(".")
    fewer = [".".join(parts[:n] + parts[n + 1 :]) for n in range(len(parts) - 1) if not parts[n].isdigit()]
    found = [p for p in dict.fromkeys([path, *fewer]) if p in modules]
    return found[0] if found and (found[0] == path or len(found) == 1) else None


def renaming_tables(model: nn.Module) -> Iterator[Any]:
    """Transformers' renamings for the kind of a model, where it has any."""
    mapping = sys.modules.get("transformers.conversion_mapping")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if mapping is None or kind is None:
        return
    from transformers.core_model_loading import WeightRenaming

    aliases = getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    for name in dict.fromkeys((kind, aliases.get(kind), type(model).__name__, aliases.get(type(model).__name__))):
        for rule in mapping.get_checkpoint_conversion_mapping(name) or () if name else ():
            if type(rule) is WeightRenaming:
                yield rule


def rename_key(path: str, renamings: list[Any]) -> str:
    """A module's path as today's model has it."""
    from transformers.core_model_loading import rename_source_key

    found, _ = rename_source_key(f"{path}.weight", renamings, [])
    return str(found).removesuffix(".weight")
