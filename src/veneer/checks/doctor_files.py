"""An adapter's files as the doctor reads them: config, tensors and the parts of their keys. No model is built."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..files import adapter_files
from ..io import fingerprint, locate
from ..io.fingerprint import Fingerprint
from ..lifecycle.keys import PREFIX
from ..targets.defaults import pattern_value

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"

# Values of init_lora_weights, by their beginning, that subtract the start's share from the base weight.
_COMPUTED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # put into keys by torch


@dataclass
class AdapterFiles:
    """An adapter's files.

    Attributes:
        where: folder or hub id.
        config: content of `adapter_config.json`.
        tensors: by their key in the file.
        safe: whether they were in a safetensors file.
        pipeline: content of diffusers' own file, if it exists.
        base: the file's record of its base model.
    """

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    safe: bool = True
    pipeline: dict[str, Tensor] | None = None
    base: Fingerprint | None = None

    @classmethod
    def read(cls, where: str | os.PathLike[str]) -> AdapterFiles:
        """Read a folder or a hub id.

        Raises:
            ValueError: it does not contain an adapter, or a damaged one.
        """
        config, _ = locate.read_config(where)
        if "peft_type" not in config:
            raise ValueError(
                f"{os.fspath(where)!r} is no adapter in peft's layout: its {locate.CONFIG_NAME} has no peft_type; give the "
                "folder an adapter was saved to"
            )
        safe = locate.find_file(where, locate.WEIGHTS_NAME) is not None
        own = locate.find_file(where, DIFFUSERS_NAME)
        pipeline = None if own is None else locate.read_tensors(own)
        base = fingerprint.read_fingerprint(locate.weights_path(where)) if safe else None
        return cls(os.fspath(where), config, locate.load_weights(where), safe, pipeline, base)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the files into a folder, atomically."""
        target = locate.folder_to_write(folder)
        adapter_files.save_pair(self.tensors, self.config, target, self.base)
        if self.pipeline is not None:
            adapter_files.save_weights(self.pipeline, target, name=DIFFUSERS_NAME)
        (target / locate.OLD_WEIGHTS_NAME).unlink(missing_ok=True)

    @property
    def method(self) -> str:
        return str(self.config["peft_type"])

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """Module -> its low-rank factors, by their name in the file."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name = parse_key(key)
            if name is not None and name.part in FACTORS and name.leaf != "bias":
                found.setdefault(name.module, {})[name.part] = tensor
        return found

    def scale(self, module: str | None = None) -> float:
        """The factor of B A at a module according to the config; None for the one without patterns."""
        r, alpha = self.config.get("r", 8), self.config.get("lora_alpha", 8)
        if module is not None:
            r = pattern_value(self.config.get("rank_pattern") or {}, module, r)
            alpha = pattern_value(self.config.get("alpha_pattern") or {}, module, alpha)
        return float(alpha / (math.sqrt(r) if self.config.get("use_rslora") else r))

    @property
    def computed_start(self) -> str | None:
        """The start that was computed from the base weight, whose share the file does not hold; None for others."""
        start = self.config.get("init_lora_weights", True)
        return start if isinstance(start, str) and start.startswith(_COMPUTED) else None

    @property
    def largest_rank(self) -> int:
        return max(map(read_rank, self.factors().values()), default=0)

    @property
    def component(self) -> str | None:
        """The part of a diffusers pipeline that it was trained on, or None."""
        made_by = self.config.get("auto_mapping") or {}
        base = str(made_by.get("base_model_class", ""))
        names = " ".join(self.factors())
        if "UNet" in base or re.search(r"(^|\s)(down_blocks|mid_block|up_blocks)\.", names):
            return "unet"
        if "CLIPText" in base or "text_model.encoder" in names:
            return "text_encoder"
        theirs = str(made_by.get("parent_library", "")).startswith("diffusers.")
        if (theirs and "Transformer" in base) or re.search(r"(^|\s)(single_)?transformer_blocks\.", names):
            return "transformer"
        return None

    def copied_modules(self) -> list[str]:
        """Modules of which the file holds a full copy."""
        wanted = tuple(self.config.get("modules_to_save") or ())
        keys = [format_key(k) or "" for k in self.tensors if parse_key(k) is None]
        modules = [k.removeprefix(PREFIX).rpartition(".")[0] for k in keys]
        return list(dict.fromkeys(m for m in modules if m.endswith(wanted)))

    def bias_keys(self) -> list[str]:
        """Keys of biases of base layers."""
        return [k for k in self.tensors if k.endswith(".bias") and parse_key(k) is None]

    def factor_bias_keys(self) -> list[str]:
        """Keys of biases on factors."""
        return [k for k in self.tensors if (n := parse_key(k)) is not None and n.leaf == "bias"]


@dataclass(frozen=True)
class ParsedKey:
    """The parts of a key `module.part.adapter.leaf`."""

    module: str
    part: str
    adapter: str | None
    leaf: str | None


def parse_key(key: str) -> ParsedKey | None:
    """Parse the key of a low-rank factor or a magnitude; None for others. The module is without wrappers of the model."""
    pieces = key.split(".")
    at = next((i for i, piece in enumerate(pieces) if piece in (*FACTORS, MAGNITUDE)), None)
    if at is None:
        return None
    rest = pieces[at + 1 :]
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else None
    return ParsedKey(
        strip_wrappers(".".join(pieces[:at])).removeprefix(PREFIX), pieces[at], ".".join(rest) or None, leaf
    )


def strip_wrappers(key: str) -> str:
    """A key without the names that DistributedDataParallel, torch.compile and FSDP put into it."""
    pieces = [p for p in key.split(".") if p not in _WRAPPERS]
    return ".".join(pieces[1:] if pieces and pieces[0] == "module" else pieces)


def format_key(key: str) -> str | None:
    """A key as peft writes it; None for a tensor of the base model that peft does not write."""
    if ".original_module." in key:
        return None
    name = parse_key(key)
    if name is not None:
        # Factors of embeddings are bare parameters, whose keys do not end in .weight.
        ending = f".{name.leaf}" if name.leaf and name.part not in FACTORS[2:] else ""
        return f"{PREFIX}{name.module}.{name.part}{ending}"
    key = re.sub(r"\.modules_to_save\.[^.]+\.", ".", strip_wrappers(key))
    return key if key.startswith("base_model.") else PREFIX + key


def read_rank(pair: Mapping[str, Tensor]) -> int:
    return next((t.shape[0] for n, t in pair.items() if n.endswith("_A")), 0)
