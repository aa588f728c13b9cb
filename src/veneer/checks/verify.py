"""Is an adapter what it seems: loaded again it says the same, merged it says the same, unmerged the base has its own bits.

What a new process finds, on the base as it is on disk, is compared with what the model says here. The result is a
certificate beside the adapter's files, which loading holds against them.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import adapter_files
from ..files.certificate import Certificate, Check, file_digest, library_versions
from ..injection.entries import copy_name
from ..io import fingerprint, locate

if TYPE_CHECKING:
    from ..model.peft_model import PeftModel


# How far outputs may be apart, relative to the largest: the same computation again, and one that rounds elsewhere.
SAME = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3}
MERGED = {torch.float32: 1e-5, torch.float64: 1e-8, torch.bfloat16: 6e-2, torch.float16: 1e-2}
SECONDS = 900  # a process may take


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs for a transformers model: two rows, always the same.

    Raises:
        ValueError: a model that takes something else; give inputs of your own.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "")
    generator = torch.Generator().manual_seed(0)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config

    def ids(tokens: int) -> Tensor:
        vocabulary = int(text.vocab_size)
        return torch.randint(min(3, vocabulary - 1), vocabulary, (2, tokens), generator=generator)  # (2, tokens)

    if main == "input_ids":
        found = {"input_ids": ids(16)}
    elif main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        found = {"pixel_values": torch.randn(2, channels, size, size, generator=generator)}
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        found = {
            "input_features": torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        }
    elif main == "input_values":
        found = {"input_values": torch.randn(2, 4000, generator=generator)}
    else:
        raise ValueError(
            f"verify: it is not known what {type(model).__name__} takes; give inputs={{...}}, the arguments of its forward"
        )
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids(8)
    return found


def model_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model says, in float32: its logits, else the first floating-point tensor of its output."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(**{k: v.to(device) for k, v in inputs.items()})
    finally:
        model.train(was_training)
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else [out]
    found = [v for v in (getattr(out, "logits", None), *values) if isinstance(v, Tensor) and v.is_floating_point()]
    if not found:
        raise ValueError(f"verify: {type(model).__name__} returns no tensor of floating-point numbers to compare")
    return found[0].float().cpu()


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two outputs, over the largest value; infinite where they cannot be compared."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def compare_outputs(name: str, here: Tensor, there: Tensor, allowed: float, note: str = "") -> Check:
    difference = relative_difference(there, here)
    return Check(name, difference <= allowed, difference, allowed, note)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The coarsest floating-point dtype among the base's parameters, which sets what rounding does."""
    kinds = {p.dtype for n, p in model.named_parameters() if ":" not in n and p.dtype in SAME}
    return max(kinds, key=lambda k: SAME[k], default=torch.float32)


def base_bits(model: nn.Module) -> dict[str, str]:
    """Hashes of a base model's tensors, without what adapters added."""
    found = {}
    for name, tensor in model.state_dict().items():
        if ":" in name or copy_name("") in name or not isinstance(tensor, Tensor):
            continue
        data = tensor.detach().cpu().contiguous().flatten()
        found[name] = hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def check_merging(model: PeftModel, name: str, inputs: Mapping[str, Tensor], said: Tensor) -> list[Check]:
    """Merge an adapter and unmerge it: what the model says then, and the bits of the base after it."""
    base = model.get_base_model()
    before = base_bits(base)
    try:
        model.merge_adapter([name])
    except ValueError as error:
        if "cannot be merged" not in str(error) and "cannot be written" not in str(error):
            raise
        return [Check("merged", None, note=str(error).split(";")[0])]
    packed = any(s.backend is not None and s.backend.packed for s in model.runtime.places[name])
    try:
        now = model_outputs(model, inputs)
    finally:
        model.unmerge_adapter()
    if packed:  # what is lost by quantizing again is the format's; export_dense measures it
        found = Check(
            "merged", None, relative_difference(now, said), note="the base is quantized, and merging quantizes again"
        )
    else:
        found = compare_outputs("merged", said, now, MERGED[dtype_of(base)])
    after = base_bits(base)
    changed = [n for n in before if before[n] != after.get(n)]
    note = f"{len(changed)} tensors changed, first {changed[0]}" if changed else f"{len(before)} tensors"
    return [found, Check("unmerged, every bit of the base", not changed, note=note)]


def verify(
    model: PeftModel,
    folder: str | os.PathLike[str] | None = None,
    *,
    adapter_name: str = "default",
    base: str | os.PathLike[str] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """Check an adapter in every way in which it will be used, and write a certificate beside its files.

    It is saved and loaded in a new process onto the untouched base, and there merged, unmerged and merged for good; what
    is merged is loaded by transformers alone in another process, and the files by peft, where it is installed, in a
    third. Outputs are compared with those of `model`.

    Args:
        model: the model with its adapter, as it was trained or loaded.
        folder: where the adapter is saved to, unless it lies there already, and the certificate. None writes nothing.
        adapter_name: which adapter.
        base: the base model, folder or hub id. None takes where it was loaded from, and without that a copy of what it
            is now in memory.
        inputs: arguments of the forward, each a tensor whose first dimension are rows. None takes two drawn rows.

    Raises:
        ValueError: adapters are merged, the model takes inputs that are not known, or a process fails.
    """
    root: Any = model.get_base_model()
    config = model.runtime.config_of(adapter_name)
    if model.runtime.router.merged:
        raise ValueError("verify: adapters are merged into the base weights; call unmerge_adapter() first")
    given = dict(example_inputs(root) if inputs is None else inputs)
    if inputs is None and (tasks := getattr(config, "num_tasks", None)):  # prompts of several tasks
        given["task_ids"] = torch.arange(len(next(iter(given.values())))) % tasks  # (rows,)
    active = model.runtime.router.chosen
    with model.disable_adapter():
        plain = model_outputs(model, given)
    model.runtime.activate(adapter_name)
    try:
        said = model_outputs(model, given)
    finally:
        model.runtime.activate(list(active))
    checks = [check_untouched(model)]
    with tempfile.TemporaryDirectory(prefix="veneer-verify-") as made:
        place = Path(made)
        target = place / "adapter" if folder is None else Path(folder)
        if not folder_holds(target, model, adapter_name):
            adapter_files.save_adapter(model.runtime, adapter_name, target, **named_tensors_of(model, adapter_name))
        where, note = saved_base(root, base, place)
        request = {
            "base": where,
            "class": type(root).__dict__.get("_veneer_base", type(root)).__name__,
            "module": type(root).__dict__.get("_veneer_base", type(root)).__module__,
            "dtype": str(root.dtype).removeprefix("torch.")
            if isinstance(getattr(root, "dtype", None), torch.dtype)
            else None,
            "attention": getattr(getattr(root, "config", None), "_attn_implementation", None),
            "classes": getattr(getattr(root, "config", None), "num_labels", None),
            "adapter": str(target.resolve()),
            "folder": str(place),
        }
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in given.items()}, place / "inputs.safetensors")
        save_file({"said": said}, place / "said.safetensors")
        same = SAME[dtype_of(root)]
        answer = run_subprocess("veneer", request)
        checks.append(compare_outputs("loaded in a new process", said, answer["said"], same, note))
        checks += [Check(**c) for c in answer["checks"]]
        checks.append(check_alone(request, said, root, answer))
        checks.append(in_peft(request, said, same, config.peft_name))
        files = {
            n: {"size": p.stat().st_size, "sha256": file_digest(p, whole=True), "sampled": file_digest(p, whole=False)}
            for n in (locate.CONFIG_NAME, locate.WEIGHTS_NAME)
            if (p := target / n).is_file()
        }
    certificate = Certificate(
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model.runtime.known_base().id,
        relative_difference(said, plain),
        tuple(checks),
        library_versions(),
        files,
    )
    if folder is not None:
        certificate.save(target)
    return certificate


def folder_holds(folder: Path, model: PeftModel, adapter: str) -> bool:
    """Whether a folder's files are this adapter's already, value for value."""
    path = folder / locate.WEIGHTS_NAME
    if not path.is_file() or not (folder / locate.CONFIG_NAME).is_file():
        return False
    there, here = locate.read_tensors(path), adapter_files.adapter_tensors(model.runtime, adapter)
    return here.keys() <= there.keys() and all(torch.equal(there[k].to(t), t) for k, t in here.items())


def check_untouched(model: PeftModel) -> Check:
    """Whether the base still has the values that it had when the first adapter was attached."""
    then = model.runtime.known_base()
    if not then.weights:
        return Check("base untouched since attaching", None, note="its weights are quantized or sharded")
    found = fingerprint.compare_base(then, model.get_base_model())
    return Check(
        "base untouched since attaching",
        not found.describe(),
        note=found.describe() or f"{found.compared} tensors sampled",
    )


def named_tensors_of(model: PeftModel, adapter: str) -> dict[str, Any]:
    """Fields that a saved config is given where it lacks them."""
    from ..model.persistence import base_name

    if model.peft_config[adapter].base_model_name_or_path is not None:
        return {}
    return {"base_model_name_or_path": base_name(model.get_base_model())}


def saved_base(root: Any, base: str | os.PathLike[str] | None, place: Path) -> tuple[str, str]:
    """Where a new process finds the base model, and what is to be said of it.

    Raises:
        ValueError: it can neither be found on disk nor be written to it.
    """
    if base is not None:
        return os.fspath(base), ""
    name = str(getattr(getattr(root, "config", None), "_name_or_path", "") or "")
    if name and (Path(name).is_dir() or "/" in name):
        return name, ""
    if not hasattr(getattr(root, "config", None), "save_pretrained"):
        raise ValueError(
            f"verify: {type(root).__name__} is no transformers model, so a new process cannot load it; save, load and compare "
            "it with code of yours, or check merging with verify.merging"
        )
    from safetensors.torch import save_file

    target = place / "base"
    root.config.save_pretrained(target)
    own = {n: t.detach().cpu().contiguous().clone() for n, t in root.state_dict().items()
           if ":" not in n and copy_name("") not in n}  # fmt: skip
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    return str(target), "the base was never on disk: a copy of what is in memory"


def run_subprocess(how: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Look at an adapter in a process of its own.

    Raises:
        ValueError: it fails; the message is its own.
    """
    from safetensors.torch import load_file

    place = Path(request["folder"])
    (place / f"{how}.json").write_text(json.dumps(dict(request)), "utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "VENEER_STANDS_IN_FOR_PEFT"}
    source = str(Path(__file__).parents[2])  # of the package
    environment["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "veneer.checks.subprocess_check", how, str(place / f"{how}.json")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"verify: the process with {how} took more than {SECONDS} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"verify: the process with {how} failed: {said[-1] if said else 'without a word'}")
    answer: dict[str, Any] = json.loads((place / f"{how}-answer.json").read_text("utf-8"))
    return answer | {"said": load_file(place / f"{how}-said.safetensors")["said"]}


def check_alone(request: Mapping[str, Any], said: Tensor, root: nn.Module, answer: Mapping[str, Any]) -> Check:
    """The merged model, loaded by transformers without Veneer."""
    name = "merged for good, by transformers alone"
    if not answer["merged"]:
        return Check(name, None, note=answer["why"])
    try:
        there = run_subprocess("transformers", {**request, "base": answer["merged"]})["said"]
    except ValueError as error:
        return Check(name, False, note=str(error))
    return compare_outputs(name, said, there, MERGED[dtype_of(root)])


def in_peft(request: Mapping[str, Any], said: Tensor, allowed: float, method: str) -> Check:
    """The files, loaded by peft."""
    from ..peft.method_names import PEFT_METHODS

    name = "by peft"
    if method not in PEFT_METHODS:
        return Check(name, None, note=f"peft has no {method}")
    try:
        installed = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return Check(name, None, note="peft is not installed")
    try:
        there = run_subprocess("peft", request)["said"]
    except ValueError as error:
        return Check(name, None, note=f"peft {installed} cannot load it here: {error}")
    note, virtual = f"peft {installed}", there.shape[1] - said.shape[1] if there.ndim == said.ndim == 3 else 0
    if virtual > 0:  # peft's logits of a soft prompt's positions, which Veneer cuts off
        there, note = there[:, virtual:], f"{note}, its {virtual} virtual positions left out"
    return compare_outputs(name, said, there, max(allowed, 1e-5), note)


def table_rows(certificate: Certificate) -> Sequence[tuple[str, str, str, str]]:
    """Each check as text: what, verdict, difference, note."""
    verdicts = {True: "passed", False: "FAILED", None: "not applicable"}
    found = []
    for c in certificate.checks:
        far = "" if c.difference is None else f"{c.difference:.1e}"
        far += "" if c.allowed is None else f" (up to {c.allowed:.0e})"
        found.append((c.name, verdicts[c.passed], far, c.note))
    return found
