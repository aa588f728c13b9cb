"""The checks of the doctor: each yields the incompatibilities of an adapter with one program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..io import locate
from ..targets.defaults import pattern_value
from .doctor_files import DIFFUSERS_NAME, MAGNITUDE, AdapterFiles, format_key, parse_key, read_rank, strip_wrappers
from .doctor_fixes import (
    cast_tensors,
    convert_for_pipeline,
    drop_factor_biases,
    fold_rslora,
    fold_scales,
    name_dtype,
    name_targets,
    rename_keys,
    rename_magnitudes,
)
from .doctor_programs import Accepts

# Remedies where there is no exact fix.
_MERGE = "veneer merge MODEL ADAPTER OUT, and serve the merged model"
_LOSSY = "veneer convert ADAPTER --to lora --rank N --out FOLDER, which says the error it makes"
_CONVERT = "veneer convert ADAPTER --to lora --rank N --out FOLDER, for methods that change weights; else veneer merge"
_UNREAD: dict[str, tuple[str, str]] = {  # attribute of `Accepts` -> why the part is a problem, and the remedy
    "dora": ("magnitudes are not read", _LOSSY),
    "computed_start": (
        "the share that it takes out of the base weight is not in the file, and is not computed on loading",
        "veneer convert ADAPTER --to lora --rank N --out FOLDER, which is exact",
    ),
    "copies": ("a full copy is no low-rank change, and is not read", _MERGE),
    "rows": ("rows are not read", _MERGE),
    "biases": ("biases are not read", _MERGE),
    "lora_bias": ("biases are not read", _MERGE),
    "convolutions": ("only linear layers and embeddings are adapted", _MERGE),
    "embeddings": ("factors of embeddings are not read", _MERGE),
    "parameters": ("bare parameters are not adapted", _MERGE),
}
_FLOAT16_MAX = 65504

Fix = Callable[[AdapterFiles], None]


@dataclass
class Incompatibility:
    """One reason why a program does not load an adapter as it was trained.

    Attributes:
        target: the program.
        level: "error", it does not load or computes something else; "warning", it depends; "note".
        what: the part of the adapter.
        where: field, or key of the file.
        why: what the program does with it.
        remedy: what to do.
        source: where this is known from.
        fix: changes the files so that this is gone; None if there is no exact one.
    """

    target: str
    level: str
    what: str
    where: str
    why: str
    remedy: str
    source: str
    fix: Fix | None = field(default=None, repr=False)
    fixed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self).items() if n != "fix"} | {"fixable": self.fix is not None}


@dataclass(frozen=True)
class Case:
    """An adapter's files and a program that is to load them."""

    files: AdapterFiles
    target: str
    accepts: Accepts

    def report(
        self, level: str, what: str, where: str, why: str, remedy: str, fact: str = "", fix: Fix | None = None
    ) -> Incompatibility:
        return Incompatibility(self.target, level, what, where, why, remedy, self.accepts.source(fact), fix)

    def report_unread(self, fact: str, what: str, where: str) -> Incompatibility:
        return self.report("error", what, where, *_UNREAD[fact], fact)


# For all methods


def _check_method(case: Case) -> Iterator[Incompatibility]:
    if case.files.method not in case.accepts.methods:
        among = "only methods that peft injects into a model" if case.target != "peft" else "only its own"
        if len(case.accepts.methods) == 1:
            among = "only LoRA"
        why = f"{case.target} reads {among}"
        yield case.report("error", f"method {case.files.method}", "peft_type", why, _CONVERT, "methods")


def _check_format(case: Case) -> Iterator[Incompatibility]:
    if not case.files.safe:
        why, remedy = "pickles can run code, and are being phased out", f"--fix: writes {locate.WEIGHTS_NAME}"
        yield case.report("warning", "pickled weights", locate.OLD_WEIGHTS_NAME, why, remedy, fix=_mark_safe)


def _mark_safe(files: AdapterFiles) -> None:
    files.safe = True  # writing always makes a safetensors file


def _check_values(case: Case) -> Iterator[Incompatibility]:
    tensors = case.files.tensors
    if empty := [k for k, t in tensors.items() if t.numel() == 0]:
        yield case.report("error", f"{len(empty)} tensors hold no data", empty[0], "they were not gathered from their shards",
                          "save again after gathering the parameters")  # fmt: skip
    broken = [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.float()).all()]
    if broken:
        yield case.report("error", f"{len(broken)} tensors are not finite", broken[0], "outputs would be NaN",
                          "train again; this adapter is broken")  # fmt: skip
    if odd := [k for k, t in tensors.items() if t.dtype not in (torch.float32, torch.float16, torch.bfloat16)]:
        floating = all(tensors[k].is_floating_point() for k in odd)
        yield case.report("warning", f"{len(odd)} tensors are {name_dtype(tensors[odd[0]].dtype)}", odd[0],
                          "programs load float32, float16 and bfloat16",
                          "--fix: cast to float32" if floating else "save again in float32",
                          fix=partial(cast_tensors, dtype=torch.float32) if floating else None)  # fmt: skip
    large = [
        k for k, t in tensors.items() if t.is_floating_point() and t.numel() and float(t.abs().max()) > _FLOAT16_MAX
    ]
    if case.target == "vllm" and large and not broken:
        yield case.report("warning", f"values above {_FLOAT16_MAX} in {len(large)} tensors", large[0], "vLLM casts to the base's "
                          "dtype, and float16 ends there", "serve the base in bfloat16", "dtype")  # fmt: skip


def _check_component(case: Case) -> Iterator[Incompatibility]:
    """Find adapters of diffusion models for programs without such models."""
    component = case.files.component
    # transformers has CLIP, the text encoder of many pipelines.
    unknown = ("unet", "transformer", "text_encoder") if case.target == "vllm" else ("unet", "transformer")
    if case.target in ("vllm", "transformers") and component in unknown:
        where = next(iter(case.files.factors()), "peft_type")
        yield case.report("error", "of a diffusion model", where, f"{case.target} has no such model",
                          "none: load it with diffusers")  # fmt: skip


# For LoRA


def _check_keys(case: Case) -> Iterator[Incompatibility]:
    if case.target == "diffusers":  # reads a file of its own
        return
    odd = {}
    for key in case.files.tensors:
        name = parse_key(key)
        wraps = strip_wrappers(key) != key
        named = name is not None and name.adapter is not None and not case.accepts.adapter_in_key
        bare = case.accepts.prefix and not key.startswith("base_model.")
        raw = ".modules_to_save." in key or ".original_module." in key
        if wraps or named or bare or raw:
            odd[key] = format_key(key)
    if odd:
        names = {n.adapter for k in case.files.tensors if (n := parse_key(k)) is not None}
        first, wanted = next(iter(odd.items()))
        # Keys of several adapters would collide once their names are taken out.
        single = len(names) <= 1
        yield case.report(
            "error", f"{len(odd)} keys are not as peft writes them", first,
            "they find no place, and the layers stay as if untrained",
            f"--fix: renamed, this one to {wanted}" if single else f"the file holds several adapters ({names}); save them apart",
            "adapter_in_key", rename_keys if single else None,
        )  # fmt: skip


def _check_factors(case: Case) -> Iterator[Incompatibility]:
    config, factors = case.files.config, case.files.factors()
    # Factors of stacked experts hold all their ranks, and are not named after modules.
    stacked = config.get("target_parameters")
    if not factors and not stacked:
        yield case.report("error", "no low-rank factors", locate.WEIGHTS_NAME, "there is nothing to load", "save again")
    for module, pair in factors.items():
        if len(pair) != 2:
            yield case.report("error", f"{', '.join(pair)} without its partner", module, "half of a product says nothing",
                              "save again: the file was cut short")  # fmt: skip
            return
    ranks = {m: pattern_value(config.get("rank_pattern") or {}, m, config.get("r")) for m in factors}
    wrong = [m for m, pair in factors.items() if read_rank(pair) != ranks[m]]
    if wrong and not stacked:
        what = f"rank {read_rank(factors[wrong[0]])} where the config says {ranks[wrong[0]]}"
        yield case.report("error", what, wrong[0], "shapes do not fit, and the scale alpha / r is not the one of training",
                          "put the config of the training run beside the weights")  # fmt: skip


def _check_parts(case: Case) -> Iterator[Incompatibility]:
    """Find parts of a LoRA that the program does not read."""
    files, accepts, config = case.files, case.accepts, case.files.config
    factors, copies, added = files.factors(), files.copied_modules(), files.factor_bias_keys()
    if config.get("use_dora") and not accepts.dora:
        yield case.report_unread("dora", "DoRA", "use_dora")
    if files.computed_start and not accepts.computed_start:
        found = case.report_unread("computed_start", f"start {files.computed_start!r}", "init_lora_weights")
        # The start and the trained factors are subtracted from each other, which doubles the rank.
        yield replace(found, remedy=found.remedy.replace("rank N", f"rank {2 * files.largest_rank}"))
    if copies and not accepts.copies:
        yield case.report_unread("copies", "full copies of modules", ", ".join(copies))
    if any("trainable_tokens_delta" in k for k in files.tensors) and not accepts.rows:
        yield case.report_unread("rows", "trained token rows", "trainable_token_indices")
    biases = [k for k in files.bias_keys() if not any(m in k for m in copies)]
    if biases and not accepts.biases:
        yield case.report_unread("biases", f"{len(biases)} trained biases", biases[0])
    if any(files.tensors[k].any() for k in added) and not accepts.lora_bias:
        yield case.report_unread("lora_bias", "biases on B", added[0])
    convolutions = [m for m, pair in factors.items() if any(t.ndim > 2 for t in pair.values())]
    if convolutions and not accepts.convolutions:
        yield case.report_unread("convolutions", f"{len(convolutions)} convolutions", convolutions[0])
    tables = [m for m, pair in factors.items() if "lora_embedding_A" in pair]
    if tables and not accepts.embeddings:
        yield case.report_unread("embeddings", "an embedding is adapted", tables[0])
    if config.get("target_parameters") and not accepts.parameters:
        yield case.report_unread("parameters", "bare parameters", "target_parameters")
    vocabulary = tables or [m for m in factors if m.rpartition(".")[2] == "lm_head"]
    if case.target == "vllm" and vocabulary:
        why = "only architectures with embedding_modules take it, with the base's own vocabulary"
        yield case.report("warning", "an embedding or the output head is adapted", vocabulary[0], why,
                          "see whether the architecture lists it", "embeddings")  # fmt: skip
    if case.target == "vllm" and config.get("target_parameters"):
        why, remedy = (
            "only some mixture-of-experts architectures take them",
            "try it with the version that will serve it",
        )
        yield case.report("warning", "fused experts", "target_parameters", why, remedy, "parameters")


def _check_config(case: Case) -> Iterator[Incompatibility]:
    """Find fields that name parts which the file does not have, or which have no effect."""
    files, accepts, config = case.files, case.accepts, case.files.config
    if config.get("modules_to_save") and not files.copied_modules() and not accepts.copies:
        level = "error" if case.target == "vllm" else "note"  # the others do not look at it
        yield case.report(level, f"modules_to_save={config['modules_to_save']}", "modules_to_save",
                          "the config names full copies, though the file has none", "--fix: taken out of the config",
                          "copies", lambda f: f.config.update(modules_to_save=None))  # fmt: skip
    if str(config.get("bias", "none")) != "none" and not files.bias_keys() and not accepts.biases:
        yield case.report("error", f"bias={config['bias']!r}", "bias",
                          "the config names trained biases, though the file has none", "--fix: 'none' in the config",
                          "biases", lambda f: f.config.update(bias="none"))  # fmt: skip
    added = files.factor_bias_keys()
    if (added or config.get("lora_bias")) and not accepts.lora_bias and not any(files.tensors[k].any() for k in added):
        yield case.report("error", "lora_bias", "lora_bias", "biases are not read, and these are all zero", "--fix: left out",
                          "lora_bias", drop_factor_biases)  # fmt: skip
    magnitudes = [k for k in files.tensors if (n := parse_key(k)) is not None and n.part == MAGNITUDE]
    odd = [k for k in magnitudes if not k.endswith(accepts.magnitude)]
    if odd and accepts.dora and case.target != "diffusers":
        yield case.report("error", f"{len(odd)} magnitudes named as peft names them", odd[0],
                          f"{case.target} looks for {accepts.magnitude[0]}, and leaves them at their start",
                          f"--fix: named {accepts.magnitude[0]}", fix=rename_magnitudes)  # fmt: skip


def _check_other_tensors(case: Case) -> Iterator[Incompatibility]:
    """Find tensors that do not belong to a LoRA, such as embeddings that were saved with it."""
    if case.accepts.copies:
        return
    # Parts of a LoRA, which other checks report.
    known = ("trainable_tokens_delta", ".bias", ".base_layer.weight", ".original_module.", *case.files.copied_modules())
    odd = [k for k in case.files.tensors if parse_key(k) is None and not any(n in k for n in known)]
    if odd:
        yield case.report("error", f"{len(odd)} tensors that are no LoRA", odd[0], "keys of other kinds are refused",
                          f"{_MERGE}; or save with save_embedding_layers=False, where the vocabulary was not changed", "copies")  # fmt: skip


def _check_targets(case: Case) -> Iterator[Incompatibility]:
    config = case.files.config
    if case.target == "vllm" and not config.get("target_modules") and case.files.factors():
        # Names of modules would not be true of an adapter of bare parameters.
        fix = None if config.get("target_parameters") else name_targets
        yield case.report("error", "no target_modules", "target_modules", "a required field of the config",
                          "--fix: named from the file's keys" if fix else "name the modules in the config", fix=fix)  # fmt: skip


def _check_rslora(case: Case) -> Iterator[Incompatibility]:
    """Find the scale of rank-stabilized LoRA, which not every version of vLLM uses everywhere."""
    config = case.files.config
    if case.target != "vllm" or not config.get("use_rslora") or case.files.computed_start:
        return
    if config.get("rank_pattern") or config.get("alpha_pattern"):  # `_check_scales` folds all scales then
        return
    experts = config.get("target_parameters") or any(".experts" in m for m in case.files.factors())
    why = "experts get alpha / r" if experts else "versions without pull request 6909 use alpha / r"
    yield case.report("error" if experts else "note", "rsLoRA", "use_rslora", why, "--fix: the scale goes into lora_alpha",
                      "stabilized", fold_rslora)  # fmt: skip


def _check_scales(case: Case) -> Iterator[Incompatibility]:
    files, accepts, factors = case.files, case.accepts, case.files.factors()
    if (
        case.target == "diffusers" or accepts.patterns or not factors
    ):  # for diffusers, scales are folded into its own file
        return
    stacked = bool(files.config.get("target_parameters"))  # A holds the ranks of all experts
    scales = {files.scale(m) for m in factors}
    ranks = {int(files.config.get("r", 8))} if stacked else {read_rank(pair) for pair in factors.values()}
    if accepts.ranks is not None and max(ranks) > accepts.ranks[-1]:
        yield case.report("error", f"rank {max(ranks)}", "r", f"the largest is {accepts.ranks[-1]}",
                          _LOSSY.replace("rank N", f"rank {accepts.ranks[-1]}"), "ranks")  # fmt: skip
        return
    size = max(ranks) if accepts.ranks is None else next(n for n in accepts.ranks if n >= max(ranks))
    # A computed start is taken out of the base at the config's rank, which must stay.
    fix = None if stacked or files.computed_start else partial(fold_scales, rank=size)
    if scales != {files.scale()} or len(ranks) > 1:
        yield case.report("error", f"{len(scales)} different scales" if len(scales) > 1 else "ranks by layer",
                          "alpha_pattern" if files.config.get("alpha_pattern") else "rank_pattern",
                          "patterns are not read, and one scale is used for all layers",
                          f"--fix: scales go into B, and zeros fill every layer up to rank {size}" if fix else _CONVERT,
                          "patterns", fix)  # fmt: skip
    elif accepts.ranks is not None and files.config.get("r") not in accepts.ranks:
        yield case.report("note", f"rank {max(ranks)}", "r",
                          f"sizes that {case.target} reserves: {', '.join(map(str, accepts.ranks))}",
                          f"vllm serve --max-lora-rank {size}" + ("; --fix: filled up with zeros" if fix else ""),
                          "ranks", fix)  # fmt: skip


def _check_pipeline(case: Case) -> Iterator[Incompatibility]:
    """Check the file of diffusers, which reads keys that begin with the component of the pipeline, and no config."""
    files, factors = case.files, case.files.factors()
    if case.target != "diffusers" or not factors:
        return
    component = files.component
    if component is None:
        yield case.report("error", "not of a diffusion model", next(iter(factors)), "its layers are not those of a UNet, a "
                          "diffusion transformer or a CLIP text encoder", "none: load it with transformers or peft")  # fmt: skip
        return
    wanted, present = convert_for_pipeline(files, component), files.pipeline
    if present is not None and present.keys() == wanted.keys():
        if all(torch.equal(present[k], v) for k, v in wanted.items()):
            return

    def write_pipeline(files: AdapterFiles) -> None:
        files.pipeline = convert_for_pipeline(files, component)

    # The file would lack the parts that diffusers does not read.
    others = any("lora" not in k for k in files.tensors) or any("lora_embedding_A" in f for f in factors.values())
    blocked = others or bool(files.config.get("target_parameters")) or files.computed_start is not None
    yield case.report(
        "error", f"no {DIFFUSERS_NAME}" if present is None else f"{DIFFUSERS_NAME} is of other weights", locate.WEIGHTS_NAME,
        f"keys must begin with '{component}.', and the scale alpha / r is not read",
        "after the other findings" if blocked else f"--fix: {DIFFUSERS_NAME} is written beside it, the scales in B",
        "scales", None if blocked else write_pipeline,
    )  # fmt: skip


def list_checks(method: str) -> list[Callable[[Case], Iterator[Incompatibility]]]:
    """The checks for adapters of a method, in the order of the report."""
    of_lora = (_check_keys, _check_factors, _check_parts, _check_config, _check_other_tensors, _check_targets, _check_rslora,
               _check_scales, _check_pipeline)  # fmt: skip
    return [_check_method, _check_format, _check_values, *(of_lora if method == "LORA" else ()), _check_component]
