"""`plan`: build, adapt, count, run one step without bytes, and look for what would fit."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ..files import adapter_files
from ..io import fingerprint, safe_read
from ..lifecycle.adapters import runtime_of
from ..methods.base import Method
from ..methods.registry import registry
from ..model.peft_model import get_peft_model
from ..targets import select, suggest
from . import ledger, skeleton
from .layout import Counted, Peak, compute_peak
from .settings import QUANTIZED, Settings, size

TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}
FULL = "full"


@dataclass(frozen=True)
class Group:
    """Layers of one name in all blocks, and of one shape.

    Attributes:
        name: with * for the block's number.
        shape: of the weight as a matrix, (out, in).
        count: how many there are.
        why: what makes it look like an adapted one, where it is missed.
    """

    name: str
    shape: tuple[int, int]
    count: int
    why: str = ""


@dataclass(frozen=True)
class Change:
    """A change of the settings and the peak that it would have."""

    name: str
    peak: Peak
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs. Sizes are bytes.

    Attributes:
        model: as it was asked for.
        source: where its shapes are from.
        method: the method's name, or "full".
        settings: of the step and the processes.
        adapted: what gets an adapter.
        missed: linear layers that look like what is adapted, and are not.
        trained: trained numbers.
        total: all numbers, the adapter's too.
        file: size of the adapter's file.
        peak: of one process, with these settings.
        other: the same step with and without gradient checkpointing, whichever `peak` is not; None where it has none.
        gpu: what the device has, or None.
        changes: what was tried to make it fit, cheapest first.
        remedy: the cheapest of them that fits, or None.
        assumptions: what the figures rest on.
    """

    model: str
    source: str
    method: str
    settings: Settings
    adapted: tuple[Group, ...]
    missed: tuple[Group, ...]
    trained: int
    total: int
    file: int
    peak: Peak
    other: Peak | None
    gpu: int | None
    changes: tuple[Change, ...]
    remedy: Change | None
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether one process fits its device; None where no size is given."""
        return None if self.gpu is None else self.peak.card <= self.gpu

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        made = dataclasses.asdict(self)
        for holder, one in (
            (made["peak"], self.peak),
            (made["other"], self.other),
            *((c["peak"], o.peak) for c, o in zip(made["changes"], self.changes, strict=True)),
        ):
            if one is not None:
                holder.update(device=one.device, card=one.card, host=one.host)
        if self.remedy is not None:
            made["remedy"] = self.remedy.name
        return {**made, "fits": self.fits}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def plan(model: str, method: str | Method | None = "lora", *, gpu: str | int | None = None, **settings: Any) -> Plan:
    """Say what a run needs, without loading the model.

    Args:
        model: a folder with a config.json, an embedded model's name, a hub id, or a name whose shapes are shipped.
        method: a method's name or config; "full" or None for full fine-tuning.
        gpu: memory of the device, as "11GB" or bytes: the plan then says whether it fits and what would.
        settings: fields of `Settings`.

    Raises:
        ValueError: an unknown model, method, setting or size; targets that the model does not have.
    """
    room = None if gpu is None else size(gpu)
    fields = {f.name for f in dataclasses.fields(Settings)}
    for key in settings:
        if key not in fields:
            raise ValueError(
                f"plan has no setting {key!r}{suggest.suggest(key, fields)}; settings are {', '.join(sorted(fields))}"
            )
    chosen = Settings(**settings)
    if room is not None and chosen.device == "cpu":
        raise ValueError(f"gpu={gpu!r} goes with device='cuda'; leave one of them out")
    config, untied, source = skeleton.load_configuration(model)
    chosen = chosen.replace(task=chosen.task or skeleton.task_of(config))
    found = resolve_method(method, chosen.task)
    bench = Bench(config, untied, found)
    first = bench.peak(chosen)
    built = bench.model(chosen)
    adapted, missed = list_places(built)
    changes: list[Change] = []
    remedy = None
    if room is not None and first.card > room:
        changes, remedy = search_changes(bench, chosen, room)
    other = None
    if bench.checkpoints(chosen):
        other = bench.peak(chosen.replace(gradient_checkpointing=not chosen.gradient_checkpointing))
    counted = bench.count(chosen)
    return Plan(
        model=model,
        source=source,
        method=FULL if found is None else str(found.peft_type).lower(),
        settings=chosen,
        adapted=adapted,
        missed=missed,
        trained=counted.trained_numbers,
        total=counted.all_numbers,
        file=file_size(built),
        peak=first,
        other=other,
        gpu=room,
        changes=tuple(changes),
        remedy=remedy,
        assumptions=list_assumptions(chosen, source),
    )


def resolve_method(method: str | Method | None, task: str | None) -> Method | None:
    """The config of a method; None for full fine-tuning.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(method, Method):
        return method
    if method is None or method.lower() == FULL:
        return None
    known: dict[str, type[Method]] = {key.lower(): cls for key, cls in registry().items() if not cls.internal}
    if method.lower() not in known:
        names = [*sorted(known), FULL]
        raise ValueError(
            f"method={method!r}: must be one of {', '.join(names)}{suggest.suggest(method.lower(), names)}"
        )
    try:
        return known[method.lower()](task_type=TASKS[str(task)])
    except TypeError as error:
        raise ValueError(f"method {method!r} needs fields of its own: {error}; give its config") from error


class Bench:
    """Counts settings of one model and method, each once."""

    def __init__(self, config: Any, untied: bool, method: Method | None) -> None:
        self.config, self.untied, self.method = config, untied, method
        self.models: dict[Any, Any] = {}
        self.steps: dict[Any, Counter[str]] = {}

    def model(self, s: Settings) -> Any:
        """The adapted model, on the meta device."""
        key = s.task, s.dtype, s.attention
        if key not in self.models:
            self.models.clear()
            built = skeleton.build_model(self.config, str(s.task), getattr(torch, s.dtype), s.attention, self.untied)
            if self.method is None:
                built.requires_grad_(True)
            else:
                built = get_peft_model(built, self.method, low_cpu_mem_usage=True)
            self.models[key] = built
        return self.models[key]

    def checkpoints(self, s: Settings) -> bool:
        return bool(getattr(base_of(self.model(s)), "supports_gradient_checkpointing", False))

    def step(self, s: Settings) -> Counter[str]:
        """What one step holds at its peak."""
        earlier = s.gradient_accumulation > 1
        key = s.replace(
            optimizer="adamw", gradient_accumulation=1 + earlier, quantize=None, zero=None, fsdp=False, offload=None,
            processes=1,
        )  # fmt: skip
        if key not in self.steps:
            model = self.model(s)
            labels = s.target_length if s.task == "seq2seq-lm" else 0
            inputs = ledger.make_batch(str(s.task), s.batch_size, s.length, labels)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.steps[key] = ledger.measure_step(
                        model, inputs, checkpointing=s.gradient_checkpointing, accumulates=earlier, device=s.device
                    )
            except NotImplementedError as error:  # an operation whose result's shape depends on values
                kind = FULL if self.method is None else str(self.method.peft_type).lower()
                raise ValueError(
                    f"method {kind!r} on {self.config.model_type}: a step cannot run on shapes alone "
                    f"({str(error).splitlines()[0][:90]}); measure one step with the weights instead"
                ) from error
        return self.steps[key]

    def count(self, s: Settings) -> Counted:
        """Parameters, and one step."""
        model = self.model(s)
        c = Counted(itemsize=getattr(torch, s.dtype).itemsize)
        dense = quantized_layers(model) if s.quantize else set()
        per = QUANTIZED.get(str(s.quantize), 0.0)
        inside = map_blocks(base_of(model))
        in_block: Counter[str] = Counter()
        for p in model.parameters():
            size = p.numel() * p.element_size()
            if id(p) in dense:
                c.dequantized = max(c.dequantized, size)
                # int8 has a float32 a row; nf4's blocks are in its bytes a weight
                size = int(p.numel() * per) + (4 * p.shape[0] if s.quantize == "int8" else 0)
            c.all_numbers += p.numel()
            if p.requires_grad:
                c.trained += size
                c.trained_numbers += p.numel()
            else:
                c.frozen += size
            c.largest = max(c.largest, size)
            in_block[inside.get(id(p), "")] += size
        c.outside_blocks = in_block.pop("", 0)
        c.block = max(in_block.values(), default=0)
        c.buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        c.step = self.step(s)
        return c

    def peak(self, s: Settings) -> Peak:
        return compute_peak(self.count(s), s)


def base_of(model: object) -> Any:
    """A model without the face that `get_peft_model` gives it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def quantized_layers(model: object) -> set[int]:
    """Ids of the weights that bitsandbytes would store: of frozen linear layers but the output head."""
    head = head_of(base_of(model))
    kinds = select.linear_kinds()
    found: list[Any] = [m for m in base_of(model).modules() if isinstance(m, kinds) and m is not head]
    return {id(m.weight) for m in found if not m.weight.requires_grad}


def head_of(model: Any) -> nn.Module | None:
    """The layer that makes the logits; a classifier has none among its embeddings."""
    head: nn.Module | None = model.get_output_embeddings()
    return head


def map_blocks(model: nn.Module) -> dict[int, str]:
    """Id of a parameter -> the block of a list of blocks that it is in; what is in none is left out."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            for i, block in enumerate(module):
                for p in block.parameters():
                    found.setdefault(id(p), f"{name}.{i}")  # the outermost list counts
    return found


def list_places(model: object) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """What is adapted, and linear layers that look like it and are not."""
    base: nn.Module = base_of(model)
    runtime = runtime_of(base)
    if runtime is None:
        return (), ()
    sites = {s.name: s for s in runtime.sites.values()}
    adapted = group_places((n, (s.fan_out, s.patch), "") for n, s in sites.items() if s.fan_in)
    shapes = {g.shape for g in adapted}
    leaves = {n.rpartition(".")[2] for n in sites}
    head = head_of(base)
    kinds: Any = select.linear_kinds()
    missed = []
    for name, module in base.named_modules():
        if name in sites or module is head or not isinstance(module, kinds) or not layers.is_supported(module):
            continue
        rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        if not adapted or any(name.startswith(f"{n}.") for n in sites):
            continue
        same = (rows, columns) in shapes or (columns, rows) in shapes
        why = [
            "the same name as one that is adapted" if name.rpartition(".")[2] in leaves else "",
            "the same shape" if same else "a linear layer",
        ]
        missed.append((name, (rows, columns), ", ".join(w for w in why if w)))
    return adapted, group_places(missed)


def group_places(found: Any) -> tuple[Group, ...]:
    counts: Counter[Any] = Counter()
    for name, shape, why in found:
        counts[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name), tuple(shape), why] += 1
    return tuple(Group(name, shape, count, why) for (name, shape, why), count in counts.items())


def file_size(model: Any) -> int:
    """Bytes of the adapter's safetensors file, or of the whole model's."""
    pairs = adapter_files.named_tensors(model) if hasattr(model, "peft_config") else model.named_parameters()
    tensors = dict(pairs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if hasattr(model, "peft_config"):
        values, base = model.peft_config["default"].to_dict(), fingerprint.describe_outline(model.get_base_model())
        header["__metadata__"] |= {**adapter_files.metadata_of(tensors, values, base), safe_read.CHECKSUM: "0" * 32}
    at = 0
    for key, t in sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0])):
        end = at + t.numel() * t.element_size()
        header[key] = {"dtype": dtype_name(t), "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at


def dtype_name(t: Tensor) -> str:
    return next(name for name, kind in safe_read.DTYPES.items() if kind == t.dtype)


def search_changes(bench: Bench, s: Settings, room: int) -> tuple[list[Change], Change | None]:
    """Single changes, then all so far together, cheapest first, up to the first that fits."""
    tried: list[Change] = []

    def attempt(name: str, settings: Settings) -> Change:
        found = bench.peak(settings)
        change = Change(name, found, found.card <= room)
        tried.append(change)
        return change

    ladder: list[tuple[str, dict[str, Any]]] = []
    if not s.gradient_checkpointing and bench.checkpoints(s):
        ladder.append(("gradient checkpointing", {"gradient_checkpointing": True}))
    if s.batch_size > 1:
        rows = shrink_batch(bench, s, room)
        steps = s.gradient_accumulation * s.batch_size // rows
        ladder.append((f"batches of {rows}, {steps} accumulated", {"batch_size": rows, "gradient_accumulation": steps}))
    if s.dtype == "float32":
        ladder.append(("bfloat16 weights", {"dtype": "bfloat16"}))
    if bench.method is not None:
        kinds = list(QUANTIZED)
        smaller_kinds = kinds[kinds.index(s.quantize) + 1 :] if s.quantize else kinds
        ladder += [(f"{kind} weights", {"quantize": kind}) for kind in smaller_kinds]
    if s.zero != 3 and s.processes > 1:
        ladder.append((f"ZeRO-3 over {s.processes} processes", {"zero": 3, "fsdp": False}))
    if s.offload is None:
        ladder.append(("ZeRO-3 with CPU offload", {"zero": 3, "fsdp": False, "offload": "cpu"}))
    for name, change in ladder:
        one = attempt(name, s.replace(**change))
        if one.fits:
            return tried, one
    together: dict[str, dict[str, Any]] = {}
    for name, change in ladder:
        together = {n: c for n, c in together.items() if not set(c) & set(change)} | {
            name: change
        }  # int8 yields to nf4
        if len(together) > 1 and attempt(" + ".join(together), apply_changes(s, together)).fits:
            for extra in list(together)[-2::-1]:  # what the last change made needless, the dearest first
                fewer = {n: c for n, c in together.items() if n != extra}
                if len(fewer) > 1 and bench.peak(apply_changes(s, fewer)).card <= room:
                    together = fewer
                    attempt(" + ".join(together), apply_changes(s, together))
            return tried, tried[-1]
    for processes in (2, 4, 8, 16, 32, 64):
        if processes > s.processes:
            rest = [n for n in together if not n.startswith("ZeRO")]
            more = {"zero": 3, "fsdp": False, "offload": None, "processes": processes}
            settings = apply_changes(s, {n: together[n] for n in rest}).replace(**more)
            one = attempt(" + ".join([f"ZeRO-3 over {processes} processes", *rest]), settings)
            if one.fits:
                return tried, one
    return tried, None


def apply_changes(s: Settings, changes: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings with all the changes."""
    return s.replace(**{key: value for change in changes.values() for key, value in change.items()})


def shrink_batch(bench: Bench, s: Settings, room: int) -> int:
    """The largest half, quarter, ... of a batch that fits, or 1."""
    rows = s.batch_size // 2
    while rows > 1:
        if s.batch_size % rows == 0:
            steps = s.gradient_accumulation * s.batch_size // rows
            if bench.peak(s.replace(batch_size=rows, gradient_accumulation=steps)).card <= room:
                return rows
        rows //= 2
    return 1


def list_assumptions(s: Settings, source: str) -> tuple[str, ...]:
    """What the figures rest on, as sentences."""
    rows = f"{s.batch_size} rows of {s.length} tokens" + (
        f" with labels of {s.target_length}" if s.task == "seq2seq-lm" else ""
    )
    said = [
        f"shapes: {source}",
        f"one micro-batch of a process: {rows}, all padded to that length; {s.gradient_accumulation} a step",
        f"weights and computation in {s.dtype}; the adapter and its gradients in float32",
        f"optimizer {s.optimizer}, fused, so that its step needs no memory of its own",
        "activations: every storage of one step on the meta device, with Veneer's kernels; fused attention keeps no scores"
        if s.attention != "eager"
        else "activations: every storage of one step on the meta device, with Veneer's kernels; eager attention keeps scores",
        "device: what PyTorch's allocator has given out at its peak; the card needs the named extras beside it",
        "1 GB is 10^9 bytes",
    ]
    if s.quantize:
        said.append(
            f"{s.quantize}: {QUANTIZED[s.quantize]:g} bytes a weight of a linear layer"
            + (" (absmax in blocks of 64, without double quantization)" if s.quantize == "nf4" else ", a float32 a row")
        )
    if s.quantize == "nf4" and (s.zero == 3 or s.fsdp):
        said.append("sharded nf4 weights are stored in a float dtype (bnb_4bit_quant_storage)")
    if s.zero == 3:
        said.append(
            "DeepSpeed's defaults: reduce_bucket_size 5e8, stage3_max_live_parameters 1e9; with one process, recent "
            "releases gather without the second copy of the largest parameter that is counted here"
        )
    if s.offload:
        said.append("host memory is of one process; every process of a machine has its own share")
    return tuple(said)
