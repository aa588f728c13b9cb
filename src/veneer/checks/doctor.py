"""Will an adapter's files load elsewhere, and if not, why: read from the files alone, without a model.

What each program accepts stands in `TARGETS`, with its source. Cures are exact: they change how the same weights are
written, never the weights' change itself.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import adapter_files
from ..io import fingerprint, locate
from ..io.fingerprint import Fingerprint
from ..lifecycle.keys import PREFIX
from ..peft.method_names import NOT_INJECTED, PEFT_METHODS
from ..targets.defaults import pattern_value

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE = "lora_magnitude_vector"
VLLM = "https://docs.vllm.ai/en/stable/api/vllm/lora"
MEASURED = "measured with transformers 5.24, peft 0.21.2 and diffusers 0.42.1"

# Starts that take a share out of the base weight, by how the values of init_lora_weights begin.
COMPUTED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Accepts:
    """What one program reads of an adapter.

    Attributes:
        methods: values of `peft_type`.
        ranks: sizes that it reserves for an adapter; None for any rank.
        copies: full copies of modules (`modules_to_save`).
        rows: trained token rows.
        biases: trained biases of layers.
        lora_bias: biases on B.
        dora: magnitudes.
        computed_start: starts computed from the base weight, of which the file has no share (PiSSA, OLoRA).
        patterns: `rank_pattern` and `alpha_pattern`; without, there is one scale for all layers.
        scales: whether the config's scale is read at all.
        convolutions: factors of more than two dimensions.
        embeddings: factors of embeddings.
        parameters: `target_parameters`.
        prefix: whether keys must begin with `base_model.model.`.
        adapter_in_key: whether keys with the adapter's name in them are read.
        magnitude: how the key of a magnitude ends.
        sources: attribute -> where it says so.
    """

    methods: frozenset[str]
    sources: Mapping[str, str]
    ranks: tuple[int, ...] | None = None
    copies: bool = True
    rows: bool = True
    biases: bool = True
    lora_bias: bool = True
    dora: bool = True
    computed_start: bool = True
    patterns: bool = True
    scales: bool = True
    convolutions: bool = True
    embeddings: bool = True
    parameters: bool = True
    prefix: bool = False
    adapter_in_key: bool = False
    magnitude: tuple[str, ...] = (MAGNITUDE, f"{MAGNITUDE}.weight")

    def source(self, name: str) -> str:
        return self.sources.get(name, self.sources[""])


TARGETS: dict[str, Accepts] = {
    "vllm": Accepts(
        methods=frozenset({"LORA"}),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        copies=False,
        rows=False,
        biases=False,
        lora_bias=False,
        dora=False,
        computed_start=False,
        patterns=False,
        convolutions=False,
        sources={
            "": f"{VLLM}/peft_helper/ (PEFTHelper)",
            "ranks": "https://docs.vllm.ai/en/stable/api/vllm/config/lora/ (MaxLoRARanks)",
            "rows": f"{VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "biases": f"{VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "lora_bias": f"{VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "adapter_in_key": f"{VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "copies": "https://github.com/vllm-project/vllm/issues/9280",
            "dora": "https://github.com/vllm-project/vllm/issues/6983",
            "convolutions": f"{VLLM}/utils/ (get_supported_lora_modules)",
            "embeddings": f"{VLLM}/utils/ (get_supported_lora_modules), {VLLM}/lora_model/",
            "parameters": f"{VLLM}/lora_model/ (from_local_checkpoint)",
            "stabilized": "https://github.com/vllm-project/vllm/pull/6909, https://github.com/vllm-project/vllm/issues/55545",
        },
    ),
    "transformers": Accepts(
        methods=PEFT_METHODS - NOT_INJECTED,
        magnitude=(f"{MAGNITUDE}.weight",),
        sources={"": MEASURED, "methods": "peft.mapping.inject_adapter_in_model, which model.load_adapter calls"},
    ),
    "diffusers": Accepts(
        methods=frozenset({"LORA"}),
        copies=False,
        rows=False,
        biases=False,
        computed_start=False,
        scales=False,
        patterns=False,
        embeddings=False,
        parameters=False,
        sources={
            "": "diffusers.loaders.lora_pipeline (load_lora_weights), diffusers.utils.peft_utils (get_peft_kwargs)",
            "scales": MEASURED,
        },
    ),
    "peft": Accepts(
        methods=PEFT_METHODS,
        prefix=True,
        adapter_in_key=True,
        sources={"": MEASURED, "methods": "peft.PeftType of 0.21.2"},
    ),
}


# What to do where there is no exact cure.
MERGE = "veneer merge MODEL ADAPTER OUT, and serve the merged model"
LOSSY = "veneer convert ADAPTER --to lora --rank N --out FOLDER, which says the error it makes"
CONVERT = "veneer convert ADAPTER --to lora --rank N --out FOLDER, for methods that change weights; else veneer merge"
UNREAD: dict[str, tuple[str, str]] = {  # attribute of `Accepts` -> why a part is minded, and what to do
    "dora": ("magnitudes are not read", LOSSY),
    "computed_start": (
        "the share that it takes out of the base weight is not in the file, and is not computed on loading",
        "veneer convert ADAPTER --to lora --rank N --out FOLDER, which is exact",
    ),
    "copies": ("a full copy is no low-rank change, and is not read", MERGE),
    "rows": ("rows are not read", MERGE),
    "biases": ("biases are not read", MERGE),
    "lora_bias": ("biases are not read", MERGE),
    "convolutions": ("only linear layers and embeddings are adapted", MERGE),
    "embeddings": ("factors of embeddings are not read", MERGE),
    "parameters": ("bare parameters are not adapted", MERGE),
}


@dataclass
class Patient:
    """An adapter's files.

    Attributes:
        where: folder or hub id.
        config: content of `adapter_config.json`.
        tensors: by their key in the file.
        safe: whether they were in a safetensors file.
        pipeline: content of diffusers' own file, if it is there.
        base: what its file says of its base model.
    """

    where: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    safe: bool = True
    pipeline: dict[str, Tensor] | None = None
    base: Fingerprint | None = None

    @classmethod
    def read(cls, where: str | os.PathLike[str]) -> Patient:
        """Read a folder or a hub id.

        Raises:
            ValueError: it holds no adapter, or a damaged one.
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
        """The factor before B A at a module, as the config has it; None for what it is without patterns."""
        r, alpha = self.config.get("r", 8), self.config.get("lora_alpha", 8)
        if module is not None:
            r = pattern_value(self.config.get("rank_pattern") or {}, module, r)
            alpha = pattern_value(self.config.get("alpha_pattern") or {}, module, alpha)
        return float(alpha / (math.sqrt(r) if self.config.get("use_rslora") else r))

    @property
    def computed_start(self) -> str | None:
        """The start that was computed from the base weight, which the file has no share of; None for others."""
        start = self.config.get("init_lora_weights", True)
        return start if isinstance(start, str) and start.startswith(COMPUTED) else None

    @property
    def largest(self) -> int:
        """The largest rank among the factors."""
        return max((t.shape[0] for f in self.factors().values() for n, t in f.items() if n.endswith("A")), default=0)

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


@dataclass(frozen=True)
class Name:
    """A key, taken apart: `module.part.adapter.leaf`."""

    module: str
    part: str
    adapter: str | None
    leaf: str | None


def parse_key(key: str) -> Name | None:
    """A key of a low-rank factor or a magnitude; None for others. The module is without what wraps the model."""
    pieces = key.split(".")
    at = next((i for i, piece in enumerate(pieces) if piece in (*FACTORS, MAGNITUDE)), None)
    if at is None:
        return None
    rest = pieces[at + 1 :]
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else None
    return Name(strip_wrapper(".".join(pieces[:at])).removeprefix(PREFIX), pieces[at], ".".join(rest) or None, leaf)


def strip_wrapper(key: str) -> str:
    """A key without the names that DistributedDataParallel, torch.compile and FSDP put into it."""
    pieces = [p for p in key.split(".") if p not in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")]
    return ".".join(pieces[1:] if pieces and pieces[0] == "module" else pieces)


def usual_key(key: str) -> str | None:
    """A key as peft writes it; None for a tensor of the base model that peft does not write."""
    if ".original_module." in key:
        return None
    name = parse_key(key)
    if name is not None:
        ending = f".{name.leaf}" if name.leaf and name.part not in FACTORS[2:] else ""
        return f"{PREFIX}{name.module}.{name.part}{ending}"
    key = re.sub(r"\.modules_to_save\.[^.]+\.", ".", strip_wrapper(key))
    return key if key.startswith("base_model.") else PREFIX + key


Cure = Callable[[Patient], None]


@dataclass
class Finding:
    """One thing that one program minds.

    Attributes:
        target: the program.
        level: "error", it does not load or computes something else; "warning", it depends; "note".
        what: what it is.
        where: field, or key of the file.
        why: what the program does with it.
        remedy: what to do.
        source: where this is known from.
        cure: changes a patient so that this finding goes; None where there is no exact one.
    """

    target: str
    level: str
    what: str
    where: str
    why: str
    remedy: str
    source: str
    cure: Cure | None = field(default=None, repr=False)
    fixed: bool = False

    def to_dict(self) -> dict[str, Any]:
        names = ("target", "level", "what", "where", "why", "remedy", "source", "fixed")
        return {n: getattr(self, n) for n in names} | {"fixable": self.cure is not None}


def examine_adapter(
    patient: Patient, targets: Mapping[str, Accepts], dtype: torch.dtype | None = None
) -> list[Finding]:
    """What the programs mind about an adapter, the worst first.

    Args:
        patient: the adapter's files.
        targets: of `TARGETS`, by name.
        dtype: dtype that the tensors are to have; None for any floating one.
    """
    found = [f for name, accepts in targets.items() for check in CHECKS for f in check(patient, name, accepts)]
    if dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in patient.tensors.values()):
        now = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in patient.tensors.values()}))
        wanted = str(dtype).removeprefix("torch.")
        found += [
            Finding(name, "warning", f"tensors are {now}", locate.WEIGHTS_NAME, f"{wanted} is wanted", f"--fix: cast to {wanted}",
                    "--dtype", lambda p: cast_tensors(p, dtype))
            for name in targets
        ]  # fmt: skip
    order = ("error", "warning", "note")
    return sorted(found, key=lambda f: order.index(f.level))


def heal_adapter(
    patient: Patient, targets: Mapping[str, Accepts], dtype: torch.dtype | None = None
) -> tuple[Patient, list[Finding]]:
    """A patient without what has a cure, and all findings: those that are cured, marked, and those that are left.

    Raises:
        ValueError: a cure would change the values, such as a cast beyond a dtype's range.
    """
    healed = Patient(
        patient.where, copy.deepcopy(patient.config), dict(patient.tensors), patient.safe, patient.pipeline
    )
    cured: list[Finding] = []
    for _ in range(16):  # a cure can bring what another program minds into view
        left = examine_adapter(healed, targets, dtype)
        ready = next((f for f in left if f.cure is not None), None)
        if ready is None:
            return healed, [*cured, *left]
        assert ready.cure is not None
        ready.cure(healed)
        now = {(f.target, f.what) for f in examine_adapter(healed, targets, dtype)}
        cured += [replace(f, fixed=True) for f in left if f.cure is not None and (f.target, f.what) not in now]
    raise ValueError(f"{patient.where}: its cures do not come to an end; this is a fault of Veneer, please report it")


# Checks: a patient, a program's name and what it accepts -> what it minds.


def method_known(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    if p.method not in a.methods:
        among = (
            "only LoRA"
            if len(a.methods) == 1
            else "only methods that peft injects into a model"
            if target != "peft"
            else "only its own"
        )
        yield Finding(
            target, "error", f"method {p.method}", "peft_type", f"{target} reads {among}", CONVERT, a.source("methods")
        )


def file_safe(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    if not p.safe:

        def cure(p: Patient) -> None:
            p.safe = True

        yield Finding(target, "warning", "pickled weights", locate.OLD_WEIGHTS_NAME, "pickles can run code, and are being phased out",
                      f"--fix: writes {locate.WEIGHTS_NAME}", a.source(""), cure)  # fmt: skip


def values_sound(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    empty = [k for k, t in p.tensors.items() if t.numel() == 0]
    if empty:
        yield Finding(target, "error", f"{len(empty)} tensors hold no data", empty[0], "they were not gathered from their shards",
                      "save again after gathering the parameters", a.source(""))  # fmt: skip
    broken = [k for k, t in p.tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    if broken:
        yield Finding(target, "error", f"{len(broken)} tensors are not finite", broken[0], "outputs would be NaN",
                      "train again; this adapter is broken", a.source(""))  # fmt: skip
    odd = [k for k, t in p.tensors.items() if t.dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if odd:
        kind = str(p.tensors[odd[0]].dtype).removeprefix("torch.")
        cure = (
            (lambda p: cast_tensors(p, torch.float32)) if all(p.tensors[k].is_floating_point() for k in odd) else None
        )
        yield Finding(target, "warning", f"{len(odd)} tensors are {kind}", odd[0], "programs load float32, float16 and bfloat16",
                      "--fix: cast to float32" if cure else "save again in float32", a.source(""), cure)  # fmt: skip
    large = [k for k, t in p.tensors.items() if t.is_floating_point() and t.numel() and float(t.abs().max()) > 65504]
    if target == "vllm" and large and not broken:
        yield Finding(target, "warning", f"values above 65504 in {len(large)} tensors", large[0], "vLLM casts to the base's "
                      "dtype, and float16 ends there", "serve the base in bfloat16", "--dtype of vllm serve")  # fmt: skip


def keys_usual(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    if p.method != "LORA" or target == "diffusers":
        return
    odd = {}
    for key in p.tensors:
        name, wanted = parse_key(key), usual_key(key)
        wraps = strip_wrapper(key) != key
        named = name is not None and name.adapter is not None and not a.adapter_in_key
        bare = a.prefix and not key.startswith("base_model.")
        raw = ".modules_to_save." in key or ".original_module." in key
        if wraps or named or bare or raw:
            odd[key] = wanted
    if odd:
        names = {n.adapter for k in p.tensors if (n := parse_key(k)) is not None}
        one = len(names) <= 1
        first, wanted = next(iter(odd.items()))
        yield Finding(
            target, "error", f"{len(odd)} keys are not as peft writes them", first,
            "they find no place, and the layers stay as if untrained",
            f"--fix: renamed, this one to {wanted}" if one else f"the file holds several adapters ({names}); save them apart",
            a.source("adapter_in_key"), rename_keys if one else None,
        )  # fmt: skip


def factors_whole(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    if p.method != "LORA":
        return
    factors = p.factors()
    if not factors and not p.config.get("target_parameters"):
        yield Finding(
            target,
            "error",
            "no low-rank factors",
            locate.WEIGHTS_NAME,
            "there is nothing to load",
            "save again",
            a.source(""),
        )
    for module, pair in factors.items():
        if len(pair) != 2:
            yield Finding(target, "error", f"{', '.join(pair)} without its partner", module, "half of a product says nothing",
                          "save again: the file was cut short", a.source(""))  # fmt: skip
            return
    config = {m: pattern_value(p.config.get("rank_pattern") or {}, m, p.config.get("r")) for m in factors}
    wrong = [m for m, pair in factors.items() if rank_of(pair) != config[m]]
    if wrong and not p.config.get("target_parameters"):
        rank = rank_of(factors[wrong[0]])
        yield Finding(target, "error", f"rank {rank} where the config says {config[wrong[0]]}", wrong[0],
                      "shapes do not fit, and the scale alpha / r is not the one of training",
                      "put the config of the training run beside the weights", a.source(""))  # fmt: skip


def features_read(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    """Parts of a LoRA that some programs do not read."""
    if p.method != "LORA":
        return
    c, factors, copies = p.config, p.factors(), copied_modules(p)

    def unread(fact: str, what: str, where: str) -> Finding:
        return Finding(target, "error", what, where, *UNREAD[fact], a.source(fact))

    if c.get("use_dora") and not a.dora:
        yield unread("dora", "DoRA", "use_dora")
    if p.computed_start and not a.computed_start:
        found = unread("computed_start", f"start {p.computed_start!r}", "init_lora_weights")
        yield replace(found, remedy=found.remedy.replace("rank N", f"rank {2 * p.largest}"))
    if copies and not a.copies:
        yield unread("copies", "full copies of modules", ", ".join(copies))
    if any("trainable_tokens_delta" in k for k in p.tensors) and not a.rows:
        yield unread("rows", "trained token rows", "trainable_token_indices")
    biases = [k for k in p.tensors if k.endswith(".bias") and parse_key(k) is None and not any(m in k for m in copies)]
    if biases and not a.biases:
        yield unread("biases", f"{len(biases)} trained biases", biases[0])
    added = [k for k in p.tensors if (n := parse_key(k)) is not None and n.leaf == "bias"]
    if any(p.tensors[k].any() for k in added) and not a.lora_bias:
        yield unread("lora_bias", "biases on B", added[0])
    convolutions = [m for m, pair in factors.items() if any(t.ndim > 2 for t in pair.values())]
    if convolutions and not a.convolutions:
        yield unread("convolutions", f"{len(convolutions)} convolutions", convolutions[0])
    tables = [m for m, pair in factors.items() if "lora_embedding_A" in pair]
    if tables and not a.embeddings:
        yield unread("embeddings", "an embedding is adapted", tables[0])
    if c.get("target_parameters") and not a.parameters:
        yield unread("parameters", "bare parameters", "target_parameters")
    heads = [m for m in factors if m.rpartition(".")[2] == "lm_head"]
    if target == "vllm" and (tables or heads):
        found = unread("embeddings", "an embedding or the output head is adapted", (tables or heads)[0])
        why = "only architectures with embedding_modules take it, with the base's own vocabulary"
        yield replace(found, level="warning", why=why, remedy="see whether the architecture lists it")
    if target == "vllm" and c.get("target_parameters"):
        found = unread("parameters", "fused experts", "target_parameters")
        why = "only some mixture-of-experts architectures take them"
        yield replace(found, level="warning", why=why, remedy="try it with the version that will serve it")


def config_true(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    """Fields that name parts which the file does not have, or which do nothing."""
    if p.method != "LORA":
        return
    c = p.config
    if c.get("modules_to_save") and not copied_modules(p) and not a.copies:
        why, remedy = "the config names full copies, though the file has none", "--fix: taken out of the config"
        level = "error" if target == "vllm" else "note"  # the others do not look at it
        yield Finding(target, level, f"modules_to_save={c['modules_to_save']}", "modules_to_save", why, remedy,
                      a.source("copies"), lambda p: p.config.update(modules_to_save=None))  # fmt: skip
    biases = [k for k in p.tensors if k.endswith(".bias") and parse_key(k) is None]
    if str(c.get("bias", "none")) != "none" and not biases and not a.biases:
        why, remedy = "the config names trained biases, though the file has none", "--fix: 'none' in the config"
        yield Finding(target, "error", f"bias={c['bias']!r}", "bias", why, remedy,
                      a.source("biases"), lambda p: p.config.update(bias="none"))  # fmt: skip
    added = [k for k in p.tensors if (n := parse_key(k)) is not None and n.leaf == "bias"]
    if (added or c.get("lora_bias")) and not a.lora_bias and not any(p.tensors[k].any() for k in added):

        def leave_out(p: Patient) -> None:
            p.tensors = {k: t for k, t in p.tensors.items() if k not in added}
            p.config["lora_bias"] = False

        why, remedy = "biases are not read, and these are all zero", "--fix: left out"
        yield Finding(target, "error", "lora_bias", "lora_bias", why, remedy, a.source("lora_bias"), leave_out)
    odd = [
        k for k in p.tensors if (n := parse_key(k)) is not None and n.part == MAGNITUDE and not k.endswith(a.magnitude)
    ]
    if odd and a.dora and target != "diffusers":
        why = f"{target} looks for {a.magnitude[0]}, and leaves them at their start"
        remedy = f"--fix: named {a.magnitude[0]}"
        what = f"{len(odd)} magnitudes named as peft names them"
        yield Finding(target, "error", what, odd[0], why, remedy, a.source(""), name_magnitudes)


def scales_read(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    if p.method != "LORA" or target == "diffusers" or a.patterns or not p.factors():
        return
    stacked = bool(p.config.get("target_parameters"))  # of which A holds the ranks of all experts
    scales = {p.scale(m) for m in p.factors()}
    ranks = {int(p.config.get("r", 8))} if stacked else {rank_of(pair) for pair in p.factors().values()}
    first = p.scale()  # what a program makes of r and lora_alpha alone
    if a.ranks is not None and max(ranks) > a.ranks[-1]:
        yield Finding(target, "error", f"rank {max(ranks)}", "r", f"the largest is {a.ranks[-1]}",
                      LOSSY.replace("rank N", f"rank {a.ranks[-1]}"),
                      a.source("ranks"))  # fmt: skip
        return
    size = max(ranks) if a.ranks is None else next(n for n in a.ranks if n >= max(ranks))
    # A computed start is taken out of the base at the config's rank, which must stay.
    cure = None if stacked or p.computed_start else (lambda p: fold_scales(p, size))
    if scales != {first} or len(ranks) > 1:
        field = "alpha_pattern" if p.config.get("alpha_pattern") else "rank_pattern"
        yield Finding(target, "error", f"{len(scales)} different scales" if len(scales) > 1 else "ranks by layer", field,
                      "patterns are not read, and one scale is used for all layers",
                      f"--fix: scales go into B, and zeros fill every layer up to rank {size}" if cure else CONVERT,
                      a.source("patterns"), cure)  # fmt: skip
    elif a.ranks is not None and p.config.get("r") not in a.ranks:
        yield Finding(target, "note", f"rank {max(ranks)}", "r", f"sizes that {target} reserves: {', '.join(map(str, a.ranks))}",
                      f"vllm serve --max-lora-rank {size}" + ("; --fix: filled up with zeros" if cure else ""),
                      a.source("ranks"), cure)  # fmt: skip


def find_strays(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    """Tensors that are none of a LoRA's parts, such as embeddings that were saved along."""
    if p.method != "LORA" or a.copies:
        return
    known = ("trainable_tokens_delta", ".bias", ".base_layer.weight", ".original_module.")
    copies = copied_modules(p)
    odd = [
        k
        for k in p.tensors
        if parse_key(k) is None and not any(n in k for n in known) and not any(m in k for m in copies)
    ]
    if odd:
        yield Finding(target, "error", f"{len(odd)} tensors that are no LoRA", odd[0], "keys of other kinds are refused",
                      f"{MERGE}; or save with save_embedding_layers=False, where the vocabulary was not changed", a.source("copies"))  # fmt: skip


def check_stabilized(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    """The scale of rank-stabilized LoRA, which not every version of vLLM uses everywhere."""
    if target != "vllm" or p.method != "LORA" or not p.config.get("use_rslora") or p.computed_start:
        return
    experts = p.config.get("target_parameters") or any(".experts" in m for m in p.factors())
    plain = not p.config.get("rank_pattern") and not p.config.get("alpha_pattern")  # else all scales are folded
    if plain:
        why = "experts get alpha / r" if experts else "versions without pull request 6909 use alpha / r"
        yield Finding(target, "error" if experts else "note", "rsLoRA", "use_rslora", why, "--fix: the scale goes into lora_alpha",
                      a.source("stabilized"), fold_rslora)  # fmt: skip


def targets_named(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    if target == "vllm" and p.method == "LORA" and not p.config.get("target_modules") and p.factors():

        def name(p: Patient) -> None:
            p.config["target_modules"] = sorted({m.rpartition(".")[2] for m in p.factors()})

        only = bool(p.config.get("target_parameters"))
        yield Finding(target, "error", "no target_modules", "target_modules", "a required field of the config",
                      "name the modules in the config" if only else "--fix: named from the file's keys", a.source(""),
                      None if only else name)  # fmt: skip


def pipeline_file(p: Patient, target: str, a: Accepts) -> Iterator[Finding]:
    """Diffusers reads keys that begin with the part of the pipeline, and no config."""
    part = p.component
    if target in ("vllm", "transformers") and part is not None and (target == "vllm" or part != "text_encoder"):
        yield Finding(target, "error", "of a diffusion model", next(iter(p.factors())), f"{target} has no such model",
                      "none: load it with diffusers", a.source(""))  # fmt: skip
    if target != "diffusers" or p.method != "LORA" or not p.factors():
        return
    if part is None:
        yield Finding(target, "error", "not of a diffusion model", next(iter(p.factors())), "its layers are not those of a UNet, a "
                      "diffusion transformer or a CLIP text encoder", "none: load it with transformers or peft", a.source(""))  # fmt: skip
        return
    wanted = for_pipeline(p, part)
    there = p.pipeline
    if there is not None and there.keys() == wanted.keys() and all(torch.equal(there[k], v) for k, v in wanted.items()):
        return

    def cure(p: Patient) -> None:
        p.pipeline = for_pipeline(p, part)

    others = [k for k in p.tensors if "lora" not in k]
    blocked = bool(
        others or p.config.get("target_parameters") or any("lora_embedding_A" in f for f in p.factors().values())
    )
    blocked |= p.computed_start is not None
    yield Finding(
        target, "error", f"no {DIFFUSERS_NAME}" if there is None else f"{DIFFUSERS_NAME} is of other weights", locate.WEIGHTS_NAME,
        f"keys must begin with '{part}.', and the scale alpha / r is not read",
        "after the other findings" if blocked else f"--fix: {DIFFUSERS_NAME} is written beside it, the scales in B",
        a.source("scales"), None if blocked else cure,
    )  # fmt: skip


CHECKS: tuple[Callable[[Patient, str, Accepts], Iterator[Finding]], ...] = (
    method_known, file_safe, values_sound, keys_usual, factors_whole, features_read, config_true, find_strays, targets_named,
    check_stabilized, scales_read, pipeline_file,
)  # fmt: skip


def rank_of(pair: Mapping[str, Tensor]) -> int:
    return next((t.shape[0] for n, t in pair.items() if n.endswith("_A")), 0)


def copied_modules(p: Patient) -> list[str]:
    """Modules of which the file holds a full copy."""
    wanted = tuple(p.config.get("modules_to_save") or ())
    found = Counter(
        m
        for k in p.tensors
        if parse_key(k) is None
        and (m := (usual_key(k) or "").removeprefix(PREFIX).rpartition(".")[0]).endswith(wanted)
        and wanted
    )
    return list(found)


# Cures. They keep what the adapter does.


def rename_keys(p: Patient) -> None:
    made: dict[str, Tensor] = {}
    for key, tensor in p.tensors.items():
        wanted = usual_key(key)
        if wanted is None:
            continue
        if wanted in made:
            raise ValueError(
                f"{p.where}: two keys of the file would be {wanted!r} once renamed; save the adapter again"
            )
        made[wanted] = tensor
    p.tensors = made


def name_magnitudes(p: Patient) -> None:
    p.tensors = {f"{k}.weight" if k.endswith(MAGNITUDE) else k: t for k, t in p.tensors.items()}


def fold_scales(p: Patient, rank: int) -> None:
    """One rank and one scale for all layers: B takes the quotient of the scales, zeros fill up A and B."""
    scale = p.scale()
    made = {}
    for key, tensor in p.tensors.items():
        name = parse_key(key)
        if name is not None and name.part in FACTORS:
            if name.part.endswith("B"):
                tensor = scale_tensor(tensor, p.scale(name.module) / scale)
            if name.leaf != "bias":
                tensor = pad_axis(tensor, 0 if name.part.endswith("A") else 1, rank)
        made[key] = tensor
    p.tensors = made
    p.config |= {
        "r": rank,
        "lora_alpha": round_value(scale * rank),
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def fold_rslora(p: Patient) -> None:
    """The same scale, written as alpha / r."""
    p.config |= {"lora_alpha": round_value(p.scale() * p.config.get("r", 8)), "use_rslora": False}


def round_value(value: float) -> float:
    """A whole number as an int, as configs have it."""
    return int(value) if value == int(value) else value


def pad_axis(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind a tensor on one axis, up to a size."""
    spare = [0, 0] * (tensor.ndim - 1 - axis) + [0, size - tensor.shape[axis]]
    return F.pad(tensor, spare)


def scale_tensor(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)


def for_pipeline(p: Patient, part: str) -> dict[str, Tensor]:
    """The tensors as diffusers reads them: by the pipeline's part, with a scale of 1."""
    made = {}
    for key, tensor in p.tensors.items():
        name = parse_key(key)
        if name is None:
            continue
        value = scale_tensor(tensor, p.scale(name.module)) if name.part == "lora_B" else tensor
        ending = f".{name.leaf}" if name.leaf and name.part != MAGNITUDE else ""
        made[f"{part}.{name.module}.{name.part}{ending}"] = value
    return made


def cast_tensors(p: Patient, dtype: torch.dtype) -> None:
    """Raises ValueError where values are beyond the dtype's range."""
    limit = torch.finfo(dtype).max
    for key, tensor in p.tensors.items():
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > limit:
            raise ValueError(
                f"{p.where}: {key} holds {float(tensor.abs().max()):.3g}, beyond {str(dtype).removeprefix('torch.')}'s largest, "
                f"{limit:.3g}; choose bfloat16 or float32"
            )
    p.tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in p.tensors.items()}


def folder_for(where: str) -> Path:
    """Where a fixed copy goes unless it is said."""
    return Path(f"{where.rstrip('/')}-fixed")
