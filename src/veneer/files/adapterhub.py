"""AdapterHub's own files, both ways: what the `adapters` library 1.3.0 writes and reads for bottleneck adapters.

A folder of theirs holds `adapter_config.json` with `adapter.safetensors` or `pytorch_adapter.bin`, or, of a fusion,
`adapter_fusion_config.json` with `model_adapter_fusion.safetensors` or `pytorch_model_adapter_fusion.bin`. Files of
prediction heads in it are left alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..io import atomic_write, locate, safe_read
from ..lifecycle.adapters import Runtime
from ..lifecycle.keys import PREFIX
from ..lifecycle.load_report import LoadReport
from ..methods.base import Method
from ..methods.registry import registry
from ..targets.blocks import SublayerOutput, nearest_config
from ..training.attach import attach_watched
from ..training.penalties import penalty
from . import adapter_files
from .adapter_files import base_of

VERSION = "adapters.1.3.0"  # the layout written here
CONFIG, FUSION_CONFIG = "adapter_config.json", "adapter_fusion_config.json"
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")

# Model type -> role -> where the library has its adapters, below the block.
OUTPUTS = {"attention": "attention.output", "cross_attention": "crossattention.output", "feed_forward": "output"}
BESIDE = {
    "attention": "attention_adapters",
    "cross_attention": "cross_attention_adapters",
    "feed_forward": "output_adapters",
}
INSIDE = dict.fromkeys(BESIDE, "")  # in the module that holds the place, as T5's sub-layers do
LAYOUTS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), OUTPUTS),
    **dict.fromkeys(("bart", "mbart", "whisper", "gpt2", "llama", "mistral", "distilbert"), BESIDE),
    **dict.fromkeys(("t5", "mt5"), INSIDE),
    "vit": {"attention": "attention_adapters", "feed_forward": "output.output_adapters"},
}
BLOCKS = {"vit": (r"^(vit\.)?layers\.", r"\1encoder.layer.")}  # transformers 5 renamed these blocks

# Theirs -> ours, of fields that mean the same.
FIELDS = {
    "non_linearity": "activation", "reduction_factor": "reduction_factor", "leave_out": "leave_out", "dropout": "dropout",
    "stochastic_depth": "stochastic_depth", "original_ln_before": "original_ln_before",
    "original_ln_after": "original_ln_after", "residual_before_ln": "residual_before_ln",
    "adapter_residual_before_ln": "adapter_residual_before_ln", "is_parallel": "parallel", "scaling": "scaling",
    "use_gating": "gating", "init_weights": "init_weights", "shared_phm_rule": "phm_shared_rule",
    "factorized_phm_rule": "phm_factorized_rule", "shared_W_phm": "phm_shared_weights", "phm_bias": "phm_bias",
}  # fmt: skip
PLACES = {"mh_adapter": "attention", "cross_adapter": "cross_attention", "output_adapter": "feed_forward"}
# How their library draws starting values, which a trained adapter no longer needs.
STARTS = {"phm_c_init": "normal", "phm_init_range": 0.0001, "hypercomplex_nonlinearity": "glorot-uniform",
          "init_weights_seed": None}  # fmt: skip
REFUSED: dict[str, Any] = {"inv_adapter": None, "learn_phm": True}
DEFAULTS = {"original_ln_before": False, "scaling": 1.0, "is_parallel": False, "init_weights": "bert"}
FUSION_FIELDS = ("query", "key", "value", "query_before_ln", "regularization", "residual_before", "temperature",
                 "value_before_softmax", "value_initialized")  # fmt: skip
OLD_NAMES = {  # of the library's first versions
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
}

# Ours -> theirs, below the adapter's name.
TAILS = {
    "adapter_scaling": "scaling", "adapter_gate.weight": "gate.weight", "adapter_gate.bias": "gate.bias",
    "fusion_query.weight": "query.weight", "fusion_query.bias": "query.bias", "fusion_key.weight": "key.weight",
    "fusion_key.bias": "key.bias", "fusion_value.weight": "value.weight",
}  # fmt: skip
PHM = {"bias": "b", "left": "W_left", "right": "W_right", "rule": "phm_rule", "rule_left": "phm_rule_left",
       "rule_right": "phm_rule_right"}  # fmt: skip


def recognises(values: Mapping[str, Any]) -> bool:
    """Whether this is the content of AdapterHub's `adapter_config.json`, and not of peft's or Veneer's."""
    return "peft_type" not in values and isinstance(values.get("config"), dict)


def holds_fusion(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that AdapterHub's library wrote for a fusion."""
    return (Path(folder) / FUSION_CONFIG).is_file() and not (Path(folder) / CONFIG).exists()


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    adapter_names: Sequence[str] | None = None,
    is_trainable: bool = False,
    strict: bool = True,
    autocast_adapter_dtype: bool = True,
    **hub: object,
) -> LoadReport:
    """Load a bottleneck adapter, or a fusion of adapters that are on the model, from AdapterHub's files.

    Args:
        model: a PeftModel, or a base model, which is adapted in place.
        folder: their folder, or a hub id.
        adapter_name: the name it gets here; None for the one in the file.
        adapter_names: of a fusion, the names that its adapters have here, in its order; None for those in the file.
        is_trainable: whether its parameters are trained.
        strict: whether keys that do not fit raise; False warns.
        autocast_adapter_dtype: keep its parameters in float32 where the base is in half precision.
        **hub: `subfolder`, `revision`, `token`, `cache_dir`.

    Raises:
        ValueError: no such files, another model type, or a setting that Veneer does not have.
        AdapterLoadError: keys are missing, unexpected or of another shape; nothing was changed.
    """
    runtime = _runtime_for(model)
    found = read(runtime, folder, adapter_names, **hub)
    report: LoadReport = attach_watched(
        runtime,
        adapter_name or found.name,
        found.config.replace(inference_mode=not is_trainable),
        tensors=found.tensors,
        strict=strict,
        trainable=is_trainable,
        autocast=autocast_adapter_dtype,
    )
    return report


class HubAdapter(NamedTuple):
    """An adapter of AdapterHub's library: its name in the file, and its config and tensors as they are here."""

    name: str
    config: Method
    tensors: dict[str, Tensor]


def read(
    runtime: Runtime, folder: str | os.PathLike[str], adapter_names: Sequence[str] | None = None, **hub: Any
) -> HubAdapter:
    """Read a bottleneck adapter or a fusion; arguments and errors are those of `load`. Nothing is attached."""
    base = runtime.root
    subfolder = hub.pop("subfolder", None)
    fusion = locate.find_file(folder, CONFIG, subfolder, **hub) is None
    path = locate.find_file(folder, FUSION_CONFIG if fusion else CONFIG, subfolder, **hub)
    if path is None:
        raise ValueError(f"{os.fspath(folder)!r} holds neither {CONFIG} nor {FUSION_CONFIG}")
    values = safe_read.json_object(path)
    if not isinstance(values.get("config"), dict):
        raise ValueError(f"{path}: has no 'config' that describes an adapter; it is not of AdapterHub's library")
    if not isinstance(values.get("name"), str | list):
        raise ValueError(f"{path}: has no 'name' of an adapter; it is not of AdapterHub's library")
    kind = nearest_config(dict(base.named_modules()), "")[0]
    if values.get("model_type") not in (kind, None):
        raise ValueError(f"{path}: made for model type {values['model_type']!r}; this model is a {kind!r}")
    config = fusion_from(values, str(path), adapter_names) if fusion else config_from(values["config"], str(path))
    names = FUSION_WEIGHTS if fusion else WEIGHTS
    found = [p for n in names if (p := locate.find_file(folder, n, subfolder, **hub)) is not None]
    if not found:
        raise ValueError(f"{os.fspath(folder)!r} holds neither {names[0]} nor {names[1]}")
    theirs = locate.read_tensors(found[0])
    wanted = expected_keys(runtime, config if fusion else config.prepare(base), values["name"], fusion)
    prefix = f"{getattr(base, 'base_model_prefix', '')}."  # also of a file from a model with a head
    ours: dict[str, Tensor] = {}
    for key, value in theirs.items():
        for old, new in OLD_NAMES.items():
            key = key.replace(old, new)
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
        if key not in wanted:
            ours[key] = value  # reported as unexpected
        elif wanted[key]:
            ours[wanted[key]] = value
    return HubAdapter(str(values["name"]), config, ours)


def _runtime_for(model: nn.Module) -> Runtime:
    """The runtime of a PeftModel, also before its first adapter, or of the base model."""
    found = model.__dict__.get("_runtime")
    return found if isinstance(found, Runtime) else Runtime.ensure(base_of(model))


def save(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", *, safetensors: bool = True
) -> None:
    """Write a bottleneck adapter or a fusion as the `adapters` library does.

    Args:
        model: a PeftModel or a model adapted in place.
        folder: files of other names in it, such as those of a prediction head, are left alone.
        adapter_name: which; the library will know it by this name.
        safetensors: False writes the `.bin` that its `load_adapter` reads without `use_safetensors=True`.

    Raises:
        ValueError: another method, or something that their layout cannot say.
    """
    runtime = adapter_files.runtime_on(model)
    base, config = runtime.root, runtime.config_of(adapter_name)
    fusion = config.peft_name == "ADAPTER_FUSION"
    values = fusion_to(config) if fusion else config_to(config, base)
    name = ",".join(values["adapter_names"]) if fusion else adapter_name
    tensors = {}
    own = adapter_files.adapter_tensors(runtime, adapter_name, embeddings=False)
    prefix = prefix_of(base)
    for theirs, ours in expected_keys(runtime, config, name, fusion, copies=True).items():
        if ours in own:
            tensors[prefix + theirs] = own.pop(ours)
            own[ours] = tensors[prefix + theirs]  # a norm before the bottleneck is in their file twice
    lost = sorted(own.keys() - set(expected_keys(runtime, config, name, fusion, copies=True).values()))
    if lost:
        raise ValueError(f"adapter {adapter_name!r}: AdapterHub's layout has no place for {lost[0]} (modules_to_save)")
    about = {
        "hidden_size": hidden_width(base),
        "model_class": getattr(type(base), "_veneer_base", type(base)).__name__,
        "model_name": getattr(getattr(base, "config", None), "name_or_path", None),
        "model_type": nearest_config(dict(base.named_modules()), "")[0],
        "name": name,
        "version": VERSION,
    }
    target = locate.folder_to_write(folder)
    text = json.dumps({**about, **values}, indent=2, sort_keys=True)
    weights = (FUSION_WEIGHTS if fusion else WEIGHTS)[0 if safetensors else 1]
    if safetensors:
        adapter_files.save_weights(tensors, target, name=weights)
    else:
        ready = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        atomic_write.write_atomic(target / weights, lambda p: torch.save(ready, p))
    atomic_write.save_text(target / (FUSION_CONFIG if fusion else CONFIG), text)


def fusion_regularization(model: nn.Module, adapter_name: str) -> Tensor:
    """0.01 sum |V - I|^2 over the value matrices of a fusion, to be added to the loss; see `veneer.penalty`.

    Zero if the fusion's config has no `regularization` or no values.
    """
    return penalty(model, adapter_name)


# Configs.


def config_from(theirs: Mapping[str, Any], where: str) -> Method:
    """BottleneckConfig of their `config`.

    Raises:
        ValueError: another method, or a setting that Veneer does not have.
    """
    if theirs.get("architecture") is not None:
        raise ValueError(
            f"{where}: an AdapterHub config of {theirs['architecture']!r}; only their bottleneck adapters are read"
        )
    theirs = {**DEFAULTS, **theirs}
    known = {*FIELDS, *PLACES, *STARTS, *REFUSED, "ln_before", "ln_after", "phm_layer", "phm_dim", "phm_rank",
             "factorized_phm_W", "inv_adapter_reduction_factor", "architecture"}  # fmt: skip
    for name, allowed in REFUSED.items():
        if theirs.get(name, allowed) != allowed:
            raise ValueError(f"{where}: {name}={theirs[name]!r} is not supported; Veneer reads {name}={allowed!r} only")
    if unknown := [n for n in theirs if n not in known and theirs[n]]:
        raise ValueError(
            f"{where}: {unknown[0]}={theirs[unknown[0]]!r} is not known, and ignoring it would change the result"
        )
    norms = [w for w, n in (("before", "ln_before"), ("after", "ln_after")) if theirs.get(n)]
    fields: dict[str, Any] = {ours: theirs[name] for name, ours in FIELDS.items() if name in theirs}
    hypercomplex = bool(theirs.get("phm_layer"))
    fields |= {
        "places": [role for name, role in PLACES.items() if theirs.get(name)],
        "layer_norm": "both" if len(norms) == 2 else norms[0] if norms else None,
        "phm_dim": theirs.get("phm_dim", 4) if hypercomplex else 0,
    }
    if hypercomplex:
        fields["phm_rank"] = theirs.get("phm_rank", 1) if theirs.get("factorized_phm_W", True) else 0
    else:  # what they write of hypercomplex layers where there are none
        fields = {k: v for k, v in fields.items() if not k.startswith("phm_") or k == "phm_dim"}
    fields["activation"] = str(fields.get("activation", "relu")).lower()
    try:
        made: Method = registry()["BOTTLENECK"](**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return made


def config_to(ours: Method, base: nn.Module) -> dict[str, Any]:
    """Their `config`, as a part of the file's content."""
    if ours.peft_name != "BOTTLENECK":
        raise ValueError(
            f"this adapter is {ours.peft_name}; AdapterHub's layout is written for bottleneck adapters only"
        )
    config: Any = ours
    if config.target_modules is not None or config.exclude_modules is not None:
        raise ValueError(
            f"target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}: AdapterHub's layout knows "
            "blocks only; use places and leave_out"
        )
    values = {name: getattr(config, field) for name, field in FIELDS.items()}
    if config.width is not None:
        values["reduction_factor"] = compacter_reduction(config.width, hidden_width(base))
    values |= {name: role in config.places for name, role in PLACES.items()}
    values |= {**STARTS, **REFUSED, "inv_adapter_reduction_factor": None}
    values |= {
        "ln_before": config.layer_norm in ("before", "both"),
        "ln_after": config.layer_norm in ("after", "both"),
        "phm_layer": bool(config.phm_dim),
        "phm_dim": config.phm_dim or 4,
        "phm_rank": config.phm_rank or 1,
        "factorized_phm_W": bool(config.phm_rank),
    }
    if values["init_weights"] == "identity":  # their name for a start at zero, which hypercomplex layers lack there
        values["init_weights"] = "bert" if config.phm_dim else "mam_adapter"
    if not isinstance(values["scaling"], str):
        values["scaling"] = float(values["scaling"])  # they take no whole number
    return {"config": values}


def compacter_reduction(width: Any, size: int) -> Any:
    """The factor for which `size // factor` is the width of the bottleneck."""
    if isinstance(width, Mapping):
        return {k: compacter_reduction(w, size) for k, w in width.items()}
    factor: float = size // width if size % width == 0 else size / width
    return factor if int(size // factor) == width else size / (width + 0.5)


def fusion_from(values: Mapping[str, Any], where: str, names: Sequence[str] | None) -> Method:
    theirs = values["config"]
    own = values.get("adapter_names") or values["name"].split(",")
    if names is not None and len(names) != len(own):
        raise ValueError(f"{where}: fuses {len(own)} adapters ({', '.join(own)}); adapter_names={list(names)!r}")
    fields = {n: bool(theirs[n]) for n in FUSION_FIELDS if n in theirs}
    try:
        cls: Any = registry()["ADAPTER_FUSION"]
        made: Method = cls(adapter_names=list(names or own), dropout=theirs.get("dropout_prob"), **fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return made


def fusion_to(ours: Method) -> dict[str, Any]:
    config: Any = ours
    values = {n: getattr(config, n) for n in FUSION_FIELDS if n != "temperature"}
    rate = config.dropout or None  # theirs: None and 0 both mean the base model's
    return {
        "adapter_names": list(config.adapter_names),
        "config": {**values, "temperature": False, "dropout_prob": rate},
    }


# Names of tensors.


def expected_keys(runtime: Runtime, config: Method, name: str, fusion: bool, *, copies: bool = False) -> dict[str, str]:
    """Their keys, without the base model's prefix -> ours; "" for a copy of another key's tensor.

    Args:
        copies: give copies the key of what they copy.

    Raises:
        ValueError: a model whose layout is not known.
    """
    base = runtime.root
    kind = nearest_config(dict(base.named_modules()), "")[0]
    if kind not in LAYOUTS:
        raise ValueError(
            f"AdapterHub's layout for model type {kind!r} is not known here; it is for {', '.join(sorted(LAYOUTS))}"
        )
    found: dict[str, str] = {}
    spots = config.sites_of(base, runtime.sublayers_of)
    assert isinstance(spots, Mapping)
    method: Any = config
    for spot in spots.values():
        at = layout_place(base, kind, spot, fusion, name)
        for ours in dict.fromkeys(
            t.name for t in config.tensors.values() if t.shared_by(config) != "adapter" and t.name
        ):
            mine = f"{PREFIX}{spot.name}.{ours}"
            if fusion:
                found[at + TAILS[ours]] = mine
                continue
            before = method.layer_norm in ("before", "both")
            for theirs in key_tails(ours, method, before):
                found[at + theirs] = mine
            if before and ours.startswith("adapter_norm_before."):
                found[f"{at}adapter_down.0.{ours.rpartition('.')[2]}"] = mine if copies else ""
    for key, one in config.shared_tensors().items():
        theirs = key if key.startswith("rule") else f"W_{key}"
        theirs = f"phm_{theirs}" if key.startswith("rule") else theirs
        if not method.phm_rank:
            theirs = theirs.removesuffix("_left") if theirs.startswith("W_") else theirs
        found[f"shared_parameters.{name}.{theirs}"] = f"base_model.{one.shared_key}"
    return found


def key_tails(ours: str, config: Any, before: bool) -> list[str]:
    """What one of our tensors can be called in their file, below the adapter's name."""
    if ours in TAILS:
        return [TAILS[ours]]
    side, _, part = ours.partition(".")
    if side not in ("adapter_down", "adapter_up"):
        return [ours]
    if config.phm_dim:
        part = "W" if part == "left" and not config.phm_rank else PHM.get(part, part)
    return [f"adapter_down.{int(before)}.{part}" if side == "adapter_down" else f"adapter_up.{part}"]


def layout_place(base: nn.Module, kind: str, spot: SublayerOutput, fusion: bool, name: str) -> str:
    """Where the library has the adapter of a place, with the adapter's name."""
    if spot.role not in LAYOUTS[kind]:
        raise ValueError(f"{spot.name}: AdapterHub's layout for {kind!r} has no adapter at this place")
    block = spot.block
    if kind in BLOCKS:
        block = re.sub(*BLOCKS[kind], block)
    below = LAYOUTS[kind][spot.role]
    if not below:
        held = spot.name.removeprefix(spot.block + ".")
        below = held.rpartition(".")[0]
    what = "adapter_fusion_layer" if fusion else "adapters"
    return f"{block}.{below}.{what}.{name}.".removeprefix(prefix_of(base))


def prefix_of(base: nn.Module) -> str:
    """What a head's model puts before the names of the base model, such as "bert."."""
    prefix = getattr(base, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(base, prefix, None), nn.Module) else ""


def hidden_width(base: nn.Module) -> int:
    from ..targets.blocks import config_width

    return config_width(getattr(base, "config", None))
