"""Adapters as files, in peft's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..distributed import sharding
from ..distributed.sharding import gathered
from ..io import fingerprint, safe_read
from ..io.atomic_write import hold_lock, save_bytes, save_text, write_pair
from ..io.fingerprint import BaseMismatchWarning, Differences, Fingerprint
from ..io.locate import (
    CERTIFICATE_NAME,
    CONFIG_NAME,
    FIELDS,
    SET_NAME,
    WEIGHTS_NAME,
    field_hashes,
    find_file,
    folder_to_write,
    weights_path,
)
from ..lifecycle.adapters import Runtime, runtime_of
from ..lifecycle.keys import PREFIX
from ..lifecycle.load_report import AdapterLoadError, LoadReport
from ..methods.base import Method
from ..methods.config_file import PEFT_VERSION, config_bytes


def check_base(runtime: Runtime, path: Path, *, strict: bool = True) -> Differences | None:
    """Hold a base model against the one that the adapter in a file was trained on, where the file says which.

    Args:
        strict: whether another architecture or another size raises, or only warns.

    Returns:
        What differs, or None where the file has no fingerprint.

    Raises:
        AdapterLoadError: `strict`, and it is another architecture or size.
        ValueError: the file's fingerprint is none.
    """
    if (path.parent / CERTIFICATE_NAME).is_file():
        from .certificate import recheck_certificate

        recheck_certificate(path.parent)
    then = fingerprint.read_fingerprint(path) if path.suffix == ".safetensors" else None
    if then is None:
        return None
    now = runtime.known_base()
    if then.sizes == now.sizes and {n: now.weights.get(n) for n in then.weights} == then.weights:
        return Differences(compared=len(then.weights))
    found = fingerprint.compare_base(then, runtime.root)
    if found.shapes and strict:
        raise AdapterLoadError(
            f"{path} was trained on another base model, a {then.architecture}: {found.describe()}. Load it onto the base that "
            "its adapter_config.json names, or pass strict=False to load what fits",
            LoadReport(),
        )
    if found.shapes or found.weights:
        warnings.warn(
            f"{path} was trained on a base model with other values: {found.describe()}. It acts on this one all the same, "
            "but not as it was trained to; see which base its adapter_config.json names",
            BaseMismatchWarning,
            stacklevel=4,
        )
    return found


def check_tokenizer(where: str | os.PathLike[str], tokenizer: object) -> None:
    """Warn where an adapter was trained with another tokenizer, as far as its file says which."""
    path = weights_path(where)
    then = fingerprint.read_fingerprint(path) if path.suffix == ".safetensors" else None
    now = fingerprint.of_tokenizer(tokenizer)
    if then is not None and then.tokenizer and now and then.tokenizer != now:
        warnings.warn(
            f"{path} was trained with a tokenizer of another vocabulary or other special tokens than the base model's here: "
            "its ids mean other words; load the base model that adapter_config.json names, or its tokenizer",
            BaseMismatchWarning,
            stacklevel=3,
        )


def save_weights(tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], *, name: str = WEIGHTS_NAME) -> None:
    """Write a safetensors file with a checksum.

    Raises:
        ValueError: a tensor is empty, as parameters that were not gathered from their shards are.
    """
    data = to_safetensors_bytes(tensors)
    target = folder_to_write(folder)
    with hold_lock(target):
        save_bytes(target / name, data)


def save_pair(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    folder: str | os.PathLike[str],
    base: Fingerprint | None = None,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`: both new ones, or as they were before.

    The first has in its metadata a checksum, what the fields of the second are, and the fingerprint of the base model.

    Raises:
        ValueError: a tensor is empty, as parameters that were not gathered from their shards are.
        OSError: they cannot be written; what was there is as before.
    """
    data = to_safetensors_bytes(tensors, metadata_of(tensors, values, base))
    target = folder_to_write(folder)
    write_pair((target / WEIGHTS_NAME, data), (target / CONFIG_NAME, config_bytes(values)))


def metadata_of(keys: Iterable[str], values: Mapping[str, Any], base: Fingerprint | None) -> dict[str, str]:
    """What the weights' metadata say of the config and of the base model, where the file has tensors of these keys."""
    found = {FIELDS: json.dumps(field_hashes(values), separators=(",", ":"))}
    return found if base is None else {**found, fingerprint.KEY: base.without(keys).to_json()}


def to_safetensors_bytes(tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file."""
    from safetensors.torch import save

    empty = [k for k, v in tensors.items() if v.numel() == 0 or v.device.type == "meta"]
    if empty:
        raise ValueError(
            f"{empty[0]} (and {len(empty) - 1} more) holds no data: it is sharded or on the meta device; gather the "
            "parameters before saving"
        )
    ready = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    more = dict(more or {})
    if bad := safe_read.not_finite(ready):
        more[safe_read.NOT_FINITE] = bad
        warnings.warn(
            f"saving an adapter that has diverged: {bad} hold NaN or infinity", safe_read.NotFiniteWarning, stacklevel=4
        )
    return with_metadata(save(ready, metadata={"format": "pt"}), more)


def with_metadata(data: bytes, more: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with a checksum and more metadata, in a fixed order: safetensors writes them in any."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {
        **header.pop("__metadata__", {}),
        **more,
        safe_read.CHECKSUM: safe_read.tensor_checksum(header, data[end:]),
    }
    header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[end:]


def save_adapter(
    runtime: Runtime,
    adapter: str,
    folder: str | os.PathLike[str],
    *,
    embeddings: bool | str = "auto",
    write: bool = True,
    **fields: object,
) -> None:
    """Write one adapter's two files and, where there is none, a model card.

    Where its parameters are sharded, every process calls it: all of them gather, rank 0 writes, the others wait.
    """
    config = runtime.config_of(adapter)
    tensors = adapter_tensors(runtime, adapter, embeddings=embeddings)
    runtime.known_base()  # every process takes part, where it has to be taken again
    own = list(runtime.parameters(adapter))
    try:
        if write and sharding.writes_file(own):
            write_adapter(runtime, config, tensors, folder, **fields)
    finally:
        sharding.wait_for_all(own)


def write_adapter(
    runtime: Runtime, config: Method, tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], **fields: object
) -> None:
    """Write an adapter's files from its whole tensors."""
    if config.task_type is None and config.auto_mapping is None:
        base = type(runtime.root)
        base = getattr(base, "_veneer_base", base)
        fields["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    values = {**config.to_dict(), "inference_mode": True, **fields, "peft_version": PEFT_VERSION}
    save_pair(tensors, values, folder, runtime.known_base())
    card = Path(folder) / "README.md"
    if not card.exists():
        save_text(card, model_card(config))


def save_set(names: Sequence[str], active: Sequence[str], folder: str | os.PathLike[str]) -> None:
    """Write `adapters.json`: the adapters that a folder holds, and those that were active, in order."""
    text = json.dumps({"adapters": list(names), "active": list(active)}, indent=2) + "\n"
    save_text(folder_to_write(folder) / SET_NAME, text)


def load_set(where: str | os.PathLike[str], **hub: Any) -> tuple[list[str], list[str]]:
    """The adapters of a folder, and those to make active.

    Raises:
        ValueError: no such file, or no list of names in it.
    """
    path = find_file(where, SET_NAME, **hub)
    if path is None:
        raise ValueError(
            f"{os.fspath(where)!r} holds no {SET_NAME}, which save_pretrained writes for several adapters; leave "
            "adapters=... out to load one, and add others with load_adapter"
        )
    found = safe_read.json_object(path)
    names, active = found.get("adapters"), found.get("active")
    if not isinstance(names, list) or not isinstance(active, list):
        raise ValueError(
            f"{path} is no list of adapters and of the active ones ({str(found)[:80]}); save the model again"
        )
    if not all(isinstance(n, str) and n and not set(n) & set("/\\.:") for n in [*names, *active]):
        raise ValueError(
            f"{path}: names of adapters must be non-empty and without '/', '\\', '.' and ':'; it has {names}"
        )
    if len(set(names)) < len(names) or not set(active) <= set(names):
        raise ValueError(f"{path}: lists an adapter twice, or an active one it does not hold: {names}, active {active}")
    return names, active


def model_card(config: Method) -> str:
    """A short README for the hub."""
    base = config.base_model_name_or_path
    lines = ["---", "library_name: peft", f"tags:\n- {config.peft_name.lower()}\n- veneer"]
    if base and not os.path.exists(base):
        lines.insert(1, f"base_model: {base}")
    lines += ["---", "", f"# {config.peft_name} adapter", ""]
    lines.append(f"A thin layer for `{base or 'its base model'}`, trained with Veneer on frozen weights.")
    code = [
        "",
        "```python",
        "from veneer import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "FOLDER")',
        "```",
    ]
    return "\n".join([*lines, *code, ""])


# State dicts.


def prefix_of(model: nn.Module) -> str:
    """What keys begin with: peft's prefix for a PeftModel, nothing for a model adapted in place."""
    return PREFIX if hasattr(model, "get_base_model") else ""


def base_of(model: nn.Module) -> nn.Module:
    """The base model of a PeftModel, or a model that is adapted in place."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def runtime_on(model: nn.Module) -> Runtime:
    """The runtime of a PeftModel or of a model adapted in place.

    Raises:
        ValueError: it has no adapters.
    """
    base = base_of(model)
    found = runtime_of(base)
    if found is None:
        raise ValueError(f"{type(base).__name__} has no adapters; attach one with get_peft_model(model, config)")
    return found


def named_tensors(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """An adapter's saved tensors, the trained ones as the live Parameters, with their keys in the file."""
    return runtime_on(model).named_tensors(adapter_name, prefix_of(model))


def adapter_tensors(
    runtime: Runtime, adapter: str, *, prefix: str = PREFIX, embeddings: bool | str = "auto"
) -> dict[str, Tensor]:
    """An adapter's tensors by key, gathered from their shards.

    Args:
        embeddings: True adds the model's embeddings and output head, "auto" only where their number of rows is not
            the base config's (a vocabulary that was resized), False never.
    """
    config = runtime.config_of(adapter)
    with sharding.gathered_in_place(runtime.parameters(adapter)):
        found = {k: copy_to_host(t) for k, t in runtime.named_tensors(adapter, prefix)}
    if embeddings is True or (embeddings == "auto" and embeddings_resized(runtime.root, config)):
        for get in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(runtime.root, get, lambda: None)()
            name = next((n for n, m in runtime.root.named_modules() if m is module and n), None)
            if (
                module is not None
                and name is not None
                and not any(k.startswith(f"{prefix}{name}.weight") for k in found)
            ):
                inner = ".base_layer" if name in runtime.sites else ""
                own = module._parameters["weight"]  # read as an attribute, it can be what adapters make of it
                with sharding.gathered_in_place([own]):
                    found[f"{prefix}{name}{inner}.weight"] = copy_to_host(own)
    return found


def copy_to_host(tensor: Tensor) -> Tensor:
    """The whole of a tensor; a copy where ZeRO-3 lends it for a while."""
    return tensor.detach().clone() if sharding.is_partitioned(tensor) else gathered(tensor.detach())


def embeddings_resized(root: nn.Module, config: Method) -> bool:
    """Whether the vocabulary is not the one of the base model's own config file, where that can be read."""
    now = getattr(getattr(root, "config", None), "vocab_size", None)
    path = Path(config.base_model_name_or_path or "") / "config.json"
    if now is None or not config.base_model_name_or_path:
        return False
    try:
        then = safe_read.json_object(path).get("vocab_size")
    except (OSError, ValueError):  # no folder, or none of a model
        return False
    return then is not None and then != now
