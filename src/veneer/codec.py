"""Adapters as files, in peft's layout, both ways: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import fingerprint, reading
from .fingerprint import BaseMismatchWarning, Differences, Fingerprint
from .interop import sharding
from .interop.sharding import fill, shape_of, whole
from .method import Method, refuse_foreign, registry, suggest
from .runtime import PREFIX, AdapterLoadError, Loader, LoadReport, Runtime, runtime_of
from .writing import locked, pending, save_bytes, save_text, write_pair

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"
TRAINING_NAME = "adapter_training.safetensors"  # in checkpoints
CERTIFICATE_NAME = "adapter_certificate.json"  # what `verify` found
SET_NAME = "adapters.json"  # which adapters a folder holds, where they are several
PEFT_VERSION = "0.21.2"  # the layout written here
FIELDS = "veneer.fields"  # in the metadata of weights: the fields of the config they were saved with
APART = ("inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")  # change no result
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type")


# Reading.


def find_file(where: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """Path of an adapter's file in a folder, or fetched from the hub; None if it is not there.

    Raises:
        ValueError: `where` is neither a folder nor a hub id that can be reached.
    """
    folder = Path(where)
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f"subfolder={subfolder!r}: must be a path inside {str(where)!r}")
    if folder.is_dir():
        path = folder / (subfolder or "") / name
        path = finished(path) if name == CONFIG_NAME else path
        return path if path.is_file() else None
    if folder.exists():
        raise ValueError(f"{str(where)!r} is a file; give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    chosen = {k: v for k, v in hub.items() if k in HUB_ARGUMENTS and v is not None}
    try:
        return Path(hf_hub_download(str(where), name, subfolder=subfolder, **chosen))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{str(where)!r}: there is no such folder, and it cannot be fetched as a hub id (offline, or not cached)"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise ValueError(f"{str(where)!r}: there is no such folder, and as a hub id it fails: {error}") from error


def load_config(
    where: str | os.PathLike[str], *, subfolder: str | None = None, expected: type[Method] | None = None, **hub: Any
) -> Method:
    """Read `adapter_config.json`.

    Args:
        where: folder or hub id.
        subfolder: folder below it.
        expected: the method it must be of, or None for any.
        **hub: `revision`, `token`, `cache_dir` and the like.

    Raises:
        ValueError: no such file, no JSON, another method, or fields that cannot be honoured.
    """
    values, path = read_config(where, subfolder=subfolder, **hub)
    return config_from_dict(values, expected=expected, where=path)


def read_config(
    where: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
) -> tuple[dict[str, Any], str]:
    """The content of `adapter_config.json`, and its path; see `load_config`."""
    path = find_file(where, CONFIG_NAME, subfolder, **hub)
    if path is None:
        raise ValueError(f"{os.fspath(where)!r} holds no {CONFIG_NAME}; give the folder an adapter was saved to")
    return reading.json_object(path), str(path)


def config_from_dict(
    values: Mapping[str, Any], *, expected: type[Method] | None = None, where: str = "config"
) -> Method:
    """Build a config from the content of `adapter_config.json`; see `load_config`."""
    name = values.get("peft_type")
    methods = {k: c for k, c in registry().items() if not c.internal}
    cls = methods.get(str(name))
    if cls is None:
        raise ValueError(
            f"{where}: peft_type {name!r} is not a method of this version{suggest(str(name), methods)}; "
            f"there are {', '.join(sorted(methods))}"
        )
    if expected is not None and cls is not expected:
        raise ValueError(
            f"{where}: this is a config of {name!r} ({cls.__name__}), not of {expected.peft_name!r} "
            f"({expected.__name__}); use PeftConfig.from_pretrained to read any method"
        )
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.init}
    known, unknown = {}, []
    for key, value in values.items():
        if key in fields:
            check_value(fields[key], value, f"{where}: {key}")
            known[key] = value
        elif key in cls.foreign:
            refuse_foreign(cls, key, value)
        elif not value:  # None, False, 0, "", [], {}: how a field that is not in use is written
            unknown.append(key)
        else:
            version = values.get("peft_version")
            raise ValueError(
                f"{where}: {key}={value!r} is a field that {cls.__name__} does not know (written by peft {version}), "
                "and ignoring it would change the result; use a version of Veneer that has it, or remove the field "
                "from the file if it does not matter"
            )
    if unknown:
        warnings.warn(
            f"{where}: fields unknown to {cls.__name__} were ignored, all at their default: "
            f"{', '.join(sorted(unknown))} (written by peft {values.get('peft_version')})",
            stacklevel=3,
        )
    try:
        config = cls(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    config.from_file = True
    return config


SIZES = 1 << 16  # the largest rank, number of virtual tokens or width that a file may ask memory for
NUMBERS = ("seed", "key", "token_id")  # in the names of whole numbers that are no sizes
PLAIN: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}


def check_value(annotation: str, value: Any, where: str) -> None:
    """Raise ValueError where a field of a config file holds what its type does not allow, or a size beyond reason."""
    if annotation == "Any":  # names of modules, which are held as a set
        annotation = "list[str] | str | None"
    if not any(allows(kind.strip(), value) for kind in annotation.split("|")) and "Combination" not in annotation:
        raise ValueError(f"{where}={str(value)[:80]!r}: must be of the type {annotation.replace('None', 'null')}")
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
    for held in (h for pair in pairs for h in pair):
        if type(held) is int and abs(held) > SIZES and not any(n in where.rpartition(" ")[2] for n in NUMBERS):
            raise ValueError(f"{where}={held}: {SIZES:,} is the most that a file may ask for")
        if isinstance(held, str) and (len(held) > SIZES or "\0" in held):
            raise ValueError(
                f"{where}={held[:40]!r}...: {len(held):,} characters; {SIZES:,} are allowed, none of them NUL"
            )


def allows(kind: str, value: Any) -> bool:
    """Whether a type, as a config's class writes it, has this value of JSON's."""
    if kind.startswith(("list[", "dict[")):
        inner = kind[5:-1].rpartition(", ")[2]
        if kind.startswith("list["):
            return isinstance(value, list) and all(allows(inner, v) for v in value)
        return isinstance(value, dict) and all(
            isinstance(v, list) if inner.startswith("list") else allows(inner, v) for v in value.values()
        )
    if isinstance(value, bool) and kind not in ("bool", "Any"):
        return False
    return isinstance(value, PLAIN.get(kind, object))


def load_weights(
    where: str | os.PathLike[str], *, subfolder: str | None = None, device: str | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Read an adapter's tensors by their key in the file: safetensors, or peft's older `.bin`.

    Raises:
        ValueError: there is no weights file, or it is damaged.
    """
    return read_tensors(weights_path(where, subfolder=subfolder, **hub), device)


def weights_path(where: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Path:
    """The file of an adapter's weights; see `load_weights`."""
    path = find_file(where, WEIGHTS_NAME, subfolder, **hub) or find_file(where, OLD_WEIGHTS_NAME, subfolder, **hub)
    if path is None:
        raise ValueError(f"{os.fspath(where)!r} holds neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}")
    return path


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
        from .verification import recheck

        recheck(path.parent)
    then = fingerprint.read(path) if path.suffix == ".safetensors" else None
    if then is None:
        return None
    now = runtime.known_base()
    if then.sizes == now.sizes and {n: now.weights.get(n) for n in then.weights} == then.weights:
        return Differences(compared=len(then.weights))
    found = fingerprint.compare(then, runtime.root)
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


def read_tensors(path: str | os.PathLike[str], device: str | None = None) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a pickle of plain tensors.

    Raises:
        ValueError: there is no such file, or it is damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        found = reading.load_tensors(path)
        return found if device in (None, "cpu") else {k: t.to(device) for k, t in found.items()}
    try:
        found = torch.load(path, map_location=device or "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as plain tensors ({error}); save the adapter as safetensors"
        ) from error
    bad = [k for k, v in found.items() if not isinstance(v, Tensor)] if isinstance(found, dict) else ["the file"]
    if bad:
        raise ValueError(f"{path}: {bad[0]} is not a tensor")
    return dict(found)


def check_tokenizer(where: str | os.PathLike[str], tokenizer: Any) -> None:
    """Warn where an adapter was trained with another tokenizer, as far as its file says which."""
    path = weights_path(where)
    then = fingerprint.read(path) if path.suffix == ".safetensors" else None
    now = fingerprint.of_tokenizer(tokenizer)
    if then is not None and then.tokenizer and now and then.tokenizer != now:
        warnings.warn(
            f"{path} was trained with a tokenizer of another vocabulary or other special tokens than the base model's here: "
            "its ids mean other words; load the base model that adapter_config.json names, or its tokenizer",
            BaseMismatchWarning,
            stacklevel=3,
        )


# Writing.


def folder_to_write(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there."""
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{folder!s} is a file; give a folder to save the adapter to")
    target.mkdir(parents=True, exist_ok=True)
    return target


def save_config(config: Method, folder: str | os.PathLike[str], **changes: Any) -> None:
    """Write `adapter_config.json` with some fields changed."""
    data = config_bytes({**config.to_dict(), **changes, "peft_version": PEFT_VERSION})
    target = folder_to_write(folder)
    with locked(target):
        pending(target / CONFIG_NAME).unlink(missing_ok=True)
        save_bytes(target / CONFIG_NAME, data)


def config_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def save_weights(tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], *, name: str = WEIGHTS_NAME) -> None:
    """Write a safetensors file with a checksum.

    Raises:
        ValueError: a tensor is empty, as parameters that were not gathered from their shards are.
    """
    data = packed(tensors)
    target = folder_to_write(folder)
    with locked(target):
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
    data = packed(tensors, metadata_of(tensors, values, base))
    target = folder_to_write(folder)
    write_pair((target / WEIGHTS_NAME, data), (target / CONFIG_NAME, config_bytes(values)))


def metadata_of(keys: Iterable[str], values: Mapping[str, Any], base: Fingerprint | None) -> dict[str, str]:
    """What the weights' metadata say of the config and of the base model, where the file has tensors of these keys."""
    found = {FIELDS: json.dumps(marks(values), separators=(",", ":"))}
    return found if base is None else {**found, fingerprint.KEY: base.without(keys).to_json()}


def marks(values: Mapping[str, Any]) -> dict[str, str]:
    """A short hash of each field of a config that says what the adapter computes."""
    from xxhash import xxh3_64_hexdigest

    texts = {k: json.dumps(v, sort_keys=True) for k, v in sorted(values.items()) if k not in APART}
    return {k: xxh3_64_hexdigest(t.encode())[:8] for k, t in texts.items()}


def changed_fields(values: Mapping[str, Any], weights: Path) -> list[str]:
    """Fields of a config that are not what they were when a file of weights was saved with it; none where it does not say."""
    if weights.suffix != ".safetensors":
        return []
    text = reading.tensor_header(weights)[1].get(FIELDS)
    then = reading.json_text(text) if text is not None else None
    if not isinstance(then, dict):
        return []
    now = marks(values)
    return [k for k, mark in then.items() if now.get(k) != mark]


def finished(config: Path) -> Path:
    """The config that belongs to the weights beside it: where a save was killed between the two, the one that waits."""
    waiting = pending(config)
    weights = config.with_name(WEIGHTS_NAME)
    if not waiting.is_file() or not weights.is_file():
        return config
    if config.is_file() and not changed_fields(reading.json_object(config), weights):
        return config
    return config if changed_fields(reading.json_object(waiting), weights) else waiting


def check_config(values: Mapping[str, Any], weights: Path) -> None:
    """Warn where a config was changed since its weights were saved."""
    if changed := changed_fields(values, weights):
        warnings.warn(
            f"{weights.with_name(CONFIG_NAME)} was changed since the weights beside it were saved: {', '.join(changed)}; the "
            "adapter computes what the file says now. Save it again if that is meant",
            ConfigChangedWarning,
            stacklevel=4,
        )


class ConfigChangedWarning(UserWarning):
    """An adapter's config is not the one that its weights were saved with."""


def packed(tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None) -> bytes:
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
    if bad := reading.not_finite(ready):
        more[reading.NOT_FINITE] = bad
        warnings.warn(
            f"saving an adapter that has diverged: {bad} hold NaN or infinity", reading.NotFiniteWarning, stacklevel=4
        )
    return with_metadata(save(ready, metadata={"format": "pt"}), more)


def with_metadata(data: bytes, more: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with a checksum and more metadata, in a fixed order: safetensors writes them in any."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {**header.pop("__metadata__", {}), **more, reading.CHECKSUM: reading.checksum(header, data[end:])}
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
    **fields: Any,
) -> None:
    """Write one adapter's two files and, where there is none, a model card.

    Where its parameters are sharded, every process calls it: all of them gather, rank 0 writes, the others wait.
    """
    config = runtime.known(adapter)
    tensors = adapter_tensors(runtime, adapter, embeddings=embeddings)
    runtime.known_base()  # every process takes part, where it has to be taken again
    own = list(runtime.parameters(adapter))
    try:
        if write and sharding.writes(own):
            write_adapter(runtime, config, tensors, folder, **fields)
    finally:
        sharding.wait(own)


def write_adapter(
    runtime: Runtime, config: Method, tensors: Mapping[str, Tensor], folder: str | os.PathLike[str], **fields: Any
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
    found = reading.json_object(path)
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


def attached(model: nn.Module) -> Runtime:
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
    return attached(model).named_tensors(adapter_name, prefix_of(model))


def adapter_tensors(
    runtime: Runtime, adapter: str, *, prefix: str = PREFIX, embeddings: bool | str = "auto"
) -> dict[str, Tensor]:
    """An adapter's tensors by key, gathered from their shards.

    Args:
        embeddings: True adds the model's embeddings and output head, "auto" only where their number of rows is not
            the base config's (a vocabulary that was resized), False never.
    """
    config = runtime.known(adapter)
    with sharding.available(runtime.parameters(adapter)):
        found = {k: copied(t) for k, t in runtime.named_tensors(adapter, prefix)}
    if embeddings is True or (embeddings == "auto" and resized(runtime.root, config)):
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
                with sharding.available([own]):
                    found[f"{prefix}{name}{inner}.weight"] = copied(own)
    return found


def copied(tensor: Tensor) -> Tensor:
    """The whole of a tensor; a copy where ZeRO-3 lends it for a while."""
    return tensor.detach().clone() if sharding.is_partitioned(tensor) else whole(tensor.detach())


def resized(root: nn.Module, config: Method) -> bool:
    """Whether the vocabulary is not the one of the base model's own config file, where that can be read."""
    now = getattr(getattr(root, "config", None), "vocab_size", None)
    path = Path(config.base_model_name_or_path or "") / "config.json"
    if now is None or not config.base_model_name_or_path:
        return False
    try:
        then = reading.json_object(path).get("vocab_size")
    except (OSError, ValueError):  # no folder, or none of a model
        return False
    return then is not None and then != now


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return an adapter's tensors under their keys in the file.

    Args:
        model: a PeftModel (keys begin with `base_model.model.`), or a model adapted in place (they do not).
        state_dict: values to take instead of the model's own, by the names of `model.state_dict()`.
        adapter_name: the adapter.
        unwrap_compiled: whether `model` is the result of torch.compile.
        save_embedding_layers: see `adapter_tensors`.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    runtime = attached(model)
    prefix = prefix_of(model)
    found = adapter_tensors(runtime, adapter_name, prefix=prefix, embeddings=save_embedding_layers)
    if state_dict is None:
        return dict(found)
    names = {id(t): n for n, t in model.state_dict(keep_vars=True).items()}
    own = {k: names.get(id(t), "") for k, t in runtime.named_tensors(adapter_name, prefix)}
    return {k: whole(state_dict[n]) if (n := own.get(k, "")) in state_dict else t for k, t in found.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Copy tensors into an attached adapter, in place, so that an optimizer keeps its parameters.

    Args:
        model: a PeftModel or a model adapted in place.
        peft_model_state_dict: values by their keys in the file, with or without `base_model.model.`.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave tensors of another shape as they are instead of raising.
        low_cpu_mem_usage: accepted; values are never duplicated.
        strict: raise on keys that do not fit; False warns with the same report.

    Raises:
        AdapterLoadError: keys are missing, unexpected or of another shape. Nothing was changed.
    """
    runtime = attached(model)
    if runtime.computes_its_file(adapter_name):
        raise ValueError(
            f"adapter {adapter_name!r}: its file holds what its network computes, which cannot be turned back into the "
            "network; load it as an adapter of its own with load_adapter(folder, name)"
        )
    bare = not any(k.startswith("base_model.") for k in peft_model_state_dict)  # without peft's prefix
    loader = Loader(peft_model_state_dict)
    pairs = []
    for key, own in runtime.named_tensors(adapter_name, "" if bare else PREFIX):
        value = loader.take(key, shape_of(own))
        if value is not None:
            pairs.append((own, value))
    report = loader.report
    report.unexpected = sorted(k for k in loader.left if not k.endswith(".base_layer.weight"))
    if ignore_mismatched_sizes and report.mismatched:
        warnings.warn(f"left as they were: {report.describe()}", stacklevel=2)
        report.mismatched = []
    if not report.clean:
        text = f"adapter {adapter_name!r} does not fit these tensors:\n  {report.describe()}\nLikely cause: {report.cause()}."
        if strict:
            raise AdapterLoadError(text, report)
        warnings.warn(text, stacklevel=2)
    put(pairs)
    return report


def training_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What is trained of an adapter by its own names, whole and copied. Every process calls it where it is sharded."""
    own = attached(model).training_state(adapter)
    with sharding.available(own.values()):
        return {k: whole(t.detach()).cpu().contiguous().clone() for k, t in own.items()}


def save_training_state(model: nn.Module, adapter: str, folder: str | os.PathLike[str]) -> None:
    """Write what is trained of an adapter, `adapter_training.safetensors`, also where its file holds what it computes."""
    own = attached(model).training_state(adapter).values()
    state = training_tensors(model, adapter)
    if sharding.writes(own):
        save_weights(state, folder, name=TRAINING_NAME)
    sharding.wait(own)


def load_training_state(model: nn.Module, adapter: str, folder: str | os.PathLike[str]) -> None:
    """Copy what `save_training_state` wrote into an attached adapter, in place.

    Raises:
        AdapterLoadError: it was written for another adapter. Nothing was changed.
        ValueError: there is no such file, or it is damaged.
    """
    state = attached(model).training_state(adapter)
    loader = Loader(read_tensors(Path(folder) / TRAINING_NAME))
    pairs = [(own, loader.take(key, shape_of(own))) for key, own in state.items()]
    loader.report.unexpected = sorted(loader.left)
    if not loader.report.clean:
        raise AdapterLoadError(
            f"{folder}: does not fit adapter {adapter!r}:\n  {loader.report.describe()}", loader.report
        )
    put(pairs)  # type: ignore[arg-type]  # nothing is missing


def put(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy whole values into tensors, in place."""
    with torch.no_grad(), sharding.available([own for own, _ in pairs], change=True):
        for own, value in pairs:
            fill(own, value)


def load_peft_weights(model_id: str, device: str | None = None, **hf_hub_download_kwargs: Any) -> dict[str, Tensor]:
    """Read an adapter's tensors from a folder or a hub id; see `load_weights`."""
    return load_weights(model_id, device=device, **hf_hub_download_kwargs)
