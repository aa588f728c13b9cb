"""Finds an adapter's files in a folder or on the hub and reads them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import safe_read
from .atomic_write import pending_path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"
TRAINING_NAME = "adapter_training.safetensors"  # in checkpoints
CERTIFICATE_NAME = "adapter_certificate.json"  # what `verify` found
SET_NAME = "adapters.json"  # which adapters a folder holds, where they are several
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
        path = recover_pending_config(path) if name == CONFIG_NAME else path
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


def read_config(
    where: str | os.PathLike[str], *, subfolder: str | None = None, **hub: object
) -> tuple[dict[str, Any], str]:
    """The content of `adapter_config.json`, and its path; see `load_config`."""
    path = find_file(where, CONFIG_NAME, subfolder, **hub)
    if path is None:
        raise ValueError(f"{os.fspath(where)!r} holds no {CONFIG_NAME}; give the folder an adapter was saved to")
    return safe_read.json_object(path), str(path)


def load_weights(
    where: str | os.PathLike[str], *, subfolder: str | None = None, device: str | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Read an adapter's tensors by their key in the file: safetensors, or peft's older `.bin`.

    Raises:
        ValueError: there is no weights file, or it is damaged.
    """
    return read_tensors(weights_path(where, subfolder=subfolder, **hub), device)


def weights_path(where: str | os.PathLike[str], *, subfolder: str | None = None, **hub: object) -> Path:
    """The file of an adapter's weights; see `load_weights`."""
    path = find_file(where, WEIGHTS_NAME, subfolder, **hub) or find_file(where, OLD_WEIGHTS_NAME, subfolder, **hub)
    if path is None:
        raise ValueError(f"{os.fspath(where)!r} holds neither {WEIGHTS_NAME} nor {OLD_WEIGHTS_NAME}")
    return path


def read_tensors(path: str | os.PathLike[str], device: str | None = None) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a pickle of plain tensors.

    Raises:
        ValueError: there is no such file, or it is damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        found = safe_read.load_tensors(path)
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


# Writing.


def folder_to_write(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there."""
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{folder!s} is a file; give a folder to save the adapter to")
    target.mkdir(parents=True, exist_ok=True)
    return target


def field_hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """A short hash of each field of a config that says what the adapter computes."""
    from xxhash import xxh3_64_hexdigest

    texts = {k: json.dumps(v, sort_keys=True) for k, v in sorted(values.items()) if k not in APART}
    return {k: xxh3_64_hexdigest(t.encode())[:8] for k, t in texts.items()}


def changed_fields(values: Mapping[str, Any], weights: Path) -> list[str]:
    """Fields of a config that are not what they were when a file of weights was saved with it; none where it does not say."""
    if weights.suffix != ".safetensors":
        return []
    text = safe_read.tensor_header(weights)[1].get(FIELDS)
    then = safe_read.json_text(text) if text is not None else None
    if not isinstance(then, dict):
        return []
    now = field_hashes(values)
    return [k for k, mark in then.items() if now.get(k) != mark]


def recover_pending_config(config: Path) -> Path:
    """The config that belongs to the weights beside it: where a save was killed between the two, the one that waits."""
    waiting = pending_path(config)
    weights = config.with_name(WEIGHTS_NAME)
    if not waiting.is_file() or not weights.is_file():
        return config
    if config.is_file() and not changed_fields(safe_read.json_object(config), weights):
        return config
    return config if changed_fields(safe_read.json_object(waiting), weights) else waiting


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
