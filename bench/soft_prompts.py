"""What is measured of soft prompts."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import veneer

from .figures import SMOLLM2, bench, check, gap, median, real, relative, scramble
from .harness import ROOT, Figure, Red, Worst, interleaved, ratio

sys.path.insert(0, str(ROOT / "tests" / "parity"))

P = 20
KINDS = {"prompt": "PromptTuningConfig", "prefix": "PrefixTuningConfig"}


@check
def soft_prompt_parity(quick: bool) -> list[Figure]:
    """Largest differences of soft prompts from peft, from the same file, over architectures and methods."""
    from parity.test_soft_prompts import CELLS, MAKE, config_of, loaded_by, loss_of, made_by, matched, said

    results, gradients = Worst(), Worst()
    for case, name in CELLS[:: 8 if quick else 1]:
        where = f"{case} on {name}"
        with tempfile.TemporaryDirectory() as folder:
            theirs = made_by(peft, case, name, Path(folder))
            results.add(gap(said(loaded_by(veneer, name, Path(folder)), case, name), said(theirs, case, name)), where)
        ours = veneer.get_peft_model(MAKE[name](), config_of(veneer, case, name)).eval()
        pairs = matched(ours, theirs)
        with torch.no_grad():
            for own, other in pairs.values():
                own.copy_(other)
        for model in (ours, theirs):
            loss_of(model, case, name).backward()  # type: ignore[no-untyped-call]
        for own, other in pairs.values():
            if own.grad is None or other.grad is None:
                if own.grad is not other.grad:
                    raise Red("gradients", [f"{where}: one of the two has none"])
                continue
            gradients.add(relative(own.grad, other.grad), where)
    return [
        results.figure("soft prompts: outputs against peft", 1e-5),
        gradients.figure("soft prompts: gradients against peft, relative", 1e-5),
    ]


@check
def soft_prompt_checkpointing(quick: bool) -> list[Figure]:
    """Largest difference that gradient checkpointing makes to a soft prompt's gradients."""
    from test_door import IDS, MAKE, METHODS, SMALL, soft

    worst = Worst()
    for name in SMALL[:: 3 if quick else 1]:
        for method in METHODS:
            for reentrant in (False, True):
                found: list[dict[str, Tensor | None]] = []
                for checkpoint in (False, True):
                    base: Any = MAKE[name]()
                    model = soft(base, method).train()
                    if checkpoint:
                        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
                        base.enable_input_require_grads()
                    labels = IDS[:, :6].contiguous() if base.config.is_encoder_decoder else IDS
                    model(input_ids=IDS, labels=labels).loss.backward()
                    found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
                for key, grad in found[0].items():
                    other = found[1][key]
                    if grad is None or other is None:
                        raise Red("gradients", [f"{method} on {name}: {key} has none"])
                    worst.add(gap(other, grad), f"{method} on {name}")
    return [worst.figure("soft prompts: gradients with checkpointing against those without", 1e-5)]


def prepared(kind: str, sizes: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The same soft prompt in both libraries, and the base model."""
    config = getattr(veneer, KINDS[kind])(num_virtual_tokens=P, task_type="CAUSAL_LM")
    ours = veneer.get_peft_model(real(sizes), config).eval()
    scramble(ours)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(real(sizes), folder).eval()
    base = real(sizes)
    # One set of weights in memory for all: where weights lie alone makes two equal models differ by some percent.
    weights = {k: v for k, v in ours.get_base_model().state_dict().items() if ":" not in k}
    for other in (base, theirs.get_base_model()):
        other.load_state_dict(weights, assign=True)
    return {"veneer": ours, "peft": theirs}, base.requires_grad_(False)


def shapes(quick: bool, layers: int) -> dict[str, Any]:
    return {**SMOLLM2, "num_hidden_layers": 2 if quick else layers, "vocab_size": 4096 if quick else 16384}


@bench
def soft_prompt_forward(quick: bool) -> list[Figure]:
    """A forward with virtual tokens, against the same model with as many real tokens more."""
    sizes, found = shapes(quick, 6), []
    drawn = torch.randint(0, 4096, (4, 128 + P), generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        models, base = prepared(kind, sizes)
        with torch.no_grad():
            own, other = models["veneer"](input_ids=drawn[:, P:]).logits, models["peft"](input_ids=drawn[:, P:]).logits
            if relative(own, other[:, -128:]) > 1e-4:
                raise Red("soft prompt forward", [f"{kind}: the outputs are not peft's"])
            runs = {n: partial(m, input_ids=drawn[:, P:]) for n, m in models.items()}
            runs["tokens"] = partial(base, input_ids=drawn)
            taken = interleaved(runs, 4 if quick else 12, warmup=2)
        theirs = median([a / b for a, b in zip(taken["peft"], taken["tokens"], strict=True)])
        note = f"4 x 128 tokens, {P} virtual, SmolLM2's width, {sizes['num_hidden_layers']} layers"
        found.append(
            ratio(f"{kind} forward / {P} real tokens more", taken["veneer"], taken["tokens"], bar=1.02, reference=theirs,
                  note=note)
        )  # fmt: skip
    return found


@bench
def soft_prompt_generation(quick: bool) -> list[Figure]:
    """A new token with virtual tokens in front, against the base model with as long a cache."""
    sizes, found, steps = shapes(quick, 30), [], 8 if quick else 32
    drawn = torch.randint(0, 4096, (1, 64 + P), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for kind in KINDS:
        models, base = prepared(kind, sizes)
        said, theirs = (m.generate(input_ids=drawn[:, P:], max_new_tokens=8, **options) for m in models.values())
        once = models["veneer"].generate(input_ids=drawn[:, P:], max_new_tokens=8, use_cache=False, **options)
        if not torch.equal(said, once):
            raise Red("soft prompt generation", [f"{kind}: the text is not that of one pass for each token"])
        agrees = "" if torch.equal(said, theirs) else "; peft's text is another"
        runs = {}
        for name, model in {**models, "base": base}.items():
            ids = drawn if name == "base" else drawn[:, P:]
            for count in (1, steps + 1):
                runs[f"{name} {count}"] = partial(model.generate, input_ids=ids, max_new_tokens=count, **options)
        taken = interleaved(runs, 3 if quick else 9, warmup=1)
        times = {
            n: [a - b for a, b in zip(taken[f"{n} {steps + 1}"], taken[f"{n} 1"], strict=True)]
            for n in ("veneer", "peft", "base")
        }
        reference = median([a / b for a, b in zip(times["peft"], times["base"], strict=True)])
        note = f"{steps} tokens after 64, {P} virtual, {sizes['num_hidden_layers']} layers{agrees}"
        found.append(
            ratio(f"{kind}: a new token / base with the same cache", times["veneer"], times["base"], bar=1.03 if kind == "prefix" else None,
                  reference=reference, note=note)
        )  # fmt: skip
    return found
