"""What a thin layer costs in time: training, generating, batches with many adapters."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.serving.slots import reserve_slots

from .figures import median, relative, twin
from .harness import Figure, Red, Worst, interleaved, ratio, require
from .trio import (
    SAID,
    beside,
    drawn,
    floor,
    freeze_A,
    llama,
    no_dropout,
    pair,
    same_gradients,
    same_output,
    same_step,
    step,
    timed,
)

# hidden, layers, r, rows, tokens, bar, measured rounds
SHAPES = ((512, 8, 8, 4, 128, 1.10, 12), (1024, 6, 16, 2, 256, 1.07, 8), (256, 6, 8, 1, 32, 1.25, 50))
FIRST = SHAPES[0][:5]
ADAPTERS = tuple(f"a{i}" for i in range(32))


def said(hidden: int, layers: int, r: int, rows: int, tokens: int) -> str:
    return f"h={hidden}, {layers} layers, r={r}, {rows} x {tokens} tokens"


def full(base: Any) -> Any:
    """The same model with every parameter trained."""
    return twin(base).requires_grad_(True).train()


def with_dropout(base: Any, ids: Tensor, r: int) -> dict[str, Any]:
    """The pair with dropout of 0.1, which is checked to be there in training and not in evaluation."""
    models = pair(base, r=r, lora_dropout=0.1)
    with no_dropout(*models.values()):
        same_step(models, ids, "dropout, evaluation")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, model in models.items():
            once, again = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
            if torch.equal(once, again):
                raise Red("dropout", [f"{name}: two steps drop the same"])
    return models


@timed
def training_steps(quick: bool) -> list[Figure]:
    """A step of all-linear LoRA, three sizes, against the same model frozen; the first also with dropout."""
    found = []
    for hidden, layers, r, rows, tokens, bar, rounds in SHAPES[: 1 if quick else 3]:
        base, ids = llama(hidden, 2 if quick else layers), drawn(rows, tokens)
        models = {**pair(base, r=r), "frozen": floor(base)}
        for model in models.values():
            model.train()
        same_step(models, ids, said(hidden, layers, r, rows, tokens))
        first = (hidden, layers, r, rows, tokens) == FIRST
        if first:
            models |= {f"{n} dropout": m for n, m in with_dropout(base, ids, r).items()}
            models["full"] = full(base)
        taken = interleaved(
            {n: partial(step, m, ids) for n, m in models.items()}, 3 if quick else rounds, warmup=2, settle=2
        )
        where = said(hidden, layers, r, rows, tokens)
        note = f"forward, backward, no optimizer; {SAID}; fp32"
        found.append(
            beside(f"step / frozen: {where}", taken, "frozen", bar=bar, note=note, row=f"step ÷ frozen: {where}")
        )
        if first:
            more = {"ours": "veneer dropout", "theirs": "peft dropout", "bar": 1.20, "row": "the same with dropout 0.1"}
            found.append(beside("step with dropout 0.1 / frozen", taken, "frozen", note=where, **more))
            found.append(ratio("step of full fine-tuning / frozen", taken["full"], taken["frozen"], note=where))
    return found


@timed
def other_steps(quick: bool) -> list[Figure]:
    """A step of DoRA, and of LoRA with A frozen, against a step of LoRA."""
    hidden, layers, r, rows, tokens = FIRST
    base, ids = llama(hidden, 2 if quick else layers), drawn(rows, tokens)
    kinds = {"lora": pair(base, r=r), "dora": pair(base, r=r, use_dora=True), "fa": pair(base, r=r)}
    for kind, models in kinds.items():
        for model in models.values():
            model.train()
            if kind == "fa":
                freeze_A(model)
        same_step(models, ids, kind)
    runs = {f"{n} {k}": partial(step, m, ids) for k, models in kinds.items() for n, m in models.items()}
    taken = interleaved(runs, 3 if quick else 12, warmup=2, settle=2)
    note = said(hidden, layers, r, rows, tokens)
    lora = ("veneer lora", "peft lora")
    return [
        beside("DoRA step / LoRA step", taken, lora, ours="veneer dora", theirs="peft dora", bar=1.12, note=note,
               row="DoRA step ÷ LoRA step"),
        beside("LoRA-FA step / LoRA step", taken, lora, ours="veneer fa", theirs="peft fa", bar=1.0, note=note,
               row="LoRA-FA step ÷ LoRA step"),
    ]  # fmt: skip


class Linears(nn.Module):
    """Linears in a row, so that entering the model is a small share, and each finds its weight where a model's lies."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.proj = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(count))
        for linear in self.proj:
            nn.init.normal_(linear.weight, std=width**-0.5)  # keeps the size of what goes through

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.proj:
            x = linear(x)
        return x


def linears(count: int) -> Any:
    torch.manual_seed(0)
    return Linears(1024, count).requires_grad_(False)


@timed
def bf16_linear(quick: bool) -> list[Figure]:
    """Forward and backward of one bf16 linear with an adapter in fp32, against the linear frozen."""
    base = linears(1)
    models: dict[str, Any] = {**pair(base, r=16, target_modules=r"proj\.\d+"), "frozen": base}
    x = torch.randn(2048, 1024, dtype=torch.bfloat16).requires_grad_()  # (tokens, width)
    g = torch.randn(2048, 1024, dtype=torch.bfloat16)  # of the output
    found, worst = {}, Worst()
    for name in ("veneer", "peft"):
        y = models[name](x)
        y.backward(g)
        found[name], x.grad = (y, x.grad), None
    for what, mine, theirs in zip(("output", "gradient of x"), found["veneer"], found["peft"], strict=True):
        worst.add(relative(mine.float(), theirs.float()), what)
    same_gradients(models, worst)
    require([worst.figure("bf16 linear against peft, relative", 0.02)])

    def run(model: Any) -> None:
        model(x).backward(g)
        model.zero_grad(set_to_none=True)
        x.grad = None

    taken = interleaved({n: partial(run, m) for n, m in models.items()}, 10 if quick else 60, warmup=5, settle=2)
    note = "2048 tokens, 1024 x 1024, r=16, adapter in fp32; forward and backward, the input has a gradient"
    row = "bf16 linear, 2048 tokens × 1024², r=16 ÷ frozen"
    return [beside("bf16 linear / frozen", taken, "frozen", bar=1.50, note=note, row=row)]


@timed
def unmerged(quick: bool) -> list[Figure]:
    """A forward, and the generation of 32 tokens, with an adapter that is not merged, against the base model."""
    base = llama(512, 2 if quick else 8)
    models: dict[str, Any] = {**pair(base, r=8, task_type="CAUSAL_LM"), "base": base}
    for model in models.values():
        model.eval()
    ids, prompt = drawn(4, 128), drawn(1, 16)
    same_output(models, lambda m: m(input_ids=ids, use_cache=False).logits, "unmerged forward")
    options = {"max_new_tokens": 8 if quick else 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said_by = {n: m.generate(input_ids=prompt, **options) for n, m in models.items()}
    if not torch.equal(said_by["veneer"], said_by["peft"]):
        raise Red("unmerged generation", ["the tokens are not peft's"])
    with torch.no_grad():
        runs = {n: partial(m, input_ids=ids, use_cache=False) for n, m in models.items()}
        taken = interleaved(runs, 5 if quick else 25, warmup=3, settle=2)
        spoken = interleaved(
            {n: partial(m.generate, input_ids=prompt, **options) for n, m in models.items()},
            3 if quick else 20,
            warmup=2,
        )
    note = f"h=512, 8 layers, r=8; {SAID}"
    return [
        beside("unmerged forward / base", taken, "base", bar=1.04, note=f"4 x 128 tokens, {note}",
               row="unmerged forward ÷ base, 4×128 tokens, h=512, 8 layers"),
        beside("unmerged generation / base", spoken, "base", bar=1.08,
               note=f"32 tokens after 16, batch 1, whole `generate`, {note}",
               row="unmerged generation of 32 tokens, batch 1 ÷ base"),
    ]  # fmt: skip


@timed
def mixed_batch(quick: bool) -> list[Figure]:
    """A batch of 32 rows with 32 adapters, against one adapter for all."""
    base, ids = llama(512, 2 if quick else 8), drawn(32, 16)
    names = ADAPTERS[: 4 if quick else 32]
    rows = [names[i * 7 % len(names)] for i in range(32)]  # not in the order of the adapters
    models: dict[str, Any] = {**pair(base, names, r=8, task_type="CAUSAL_LM"), "base": base}
    for model in models.values():
        model.eval()
    models["veneer"].set_adapter(names[0])
    models["peft"].set_adapter(names[0])

    def mixed(model: Any) -> Tensor:
        more = {} if model is base else {"adapter_names": rows}
        return model(input_ids=ids, use_cache=False, **more).logits  # type: ignore[no-any-return]

    same_output(models, lambda m: m(input_ids=ids, use_cache=False).logits, "one adapter for all rows")
    same_output(models, mixed, "mixed batch")
    with torch.no_grad():
        runs = {n: partial(m, input_ids=ids, use_cache=False) for n, m in models.items()}
        runs |= {f"{n} mixed": partial(mixed, models[n]) for n in ("veneer", "peft")}
        taken = interleaved(runs, 5 if quick else 12, warmup=2, settle=2)
    note = f"32 rows x 16 tokens, h=512, 8 layers, r=8, forward; {SAID}"
    both = {"ours": "veneer mixed", "theirs": "peft mixed", "note": note}
    return [
        beside("32 adapters / one adapter", taken, ("veneer", "peft"), **both, bar=1.25,
               row="32 rows × 16 tokens, 32 adapters ÷ one adapter"),
        beside("32 adapters / base", taken, "base", **both),
    ]  # fmt: skip


@timed
def mixed_linear(quick: bool) -> list[Figure]:
    """One bf16 linear on 32 rows of one token with 32 adapters, against the linear alone."""
    base, names = linears(16), list(ADAPTERS)
    models: dict[str, Any] = {**pair(base, ADAPTERS, r=8, target_modules=r"proj\.\d+"), "base": base}
    for model in models.values():
        model.eval()
    x = torch.randn(32, 1, 1024, dtype=torch.bfloat16)  # (rows, tokens, width)
    runs = {n: partial(m, x) if n == "base" else partial(m, x, adapter_names=names) for n, m in models.items()}
    served = twin(base).eval()
    slots = reserve_slots(served, max_adapters=len(names), max_rank=8)
    with tempfile.TemporaryDirectory() as folder:
        models["veneer"].save_pretrained(folder)
        for name in names:
            slots.load(name, Path(folder) / name)
    slots.rows(names)
    runs["slots"] = partial(served, x)
    with torch.no_grad():
        mine, theirs, plain, slotted = (runs[n]().float() for n in ("veneer", "peft", "base", "slots"))
        for one in (mine, slotted):
            if relative(one, theirs) > 0.03 or relative(plain, theirs) < 0.03:
                raise Red("mixed linear", ["the outputs are not peft's, or the adapters make no difference"])
        taken = interleaved(runs, 10 if quick else 100, warmup=5, settle=2)
    note = "1024 x 1024, r=8, adapters in fp32; 16 of them in a row, so that no weight lies in a core's cache"
    row = "32 rows × 1 token, 32 adapters, bf16 linear 1024² ÷ base"
    return [
        beside("bf16 linear with 32 adapters / base", taken, "base", bar=2.0, note=note, row=row),
        ratio("bf16 linear with 32 adapters in slots / base", taken["slots"], taken["base"], bar=2.0, note=note,
              row=f"{row}, in slots", reference=median([a / b for a, b in zip(taken["peft"], taken["base"], strict=True)])),
    ]  # fmt: skip
