"""What a thin layer costs beside the frozen model, as ratios with generous margins: never a time by itself.

Each time is the best of several rounds, taken in turn, so that a machine that is busy for a while does not fail it. The
real figures are those of `make bench`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from small import scramble

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.memory import held, saved
from bench.trio import drawn, floor, freeze_A, llama, step, twin

# What each may cost at most, relative to what it is held against; the bars of the benchmark are lower.
MARGINS = {
    "step / frozen": 1.6,
    "step with dropout / frozen": 1.8,
    "DoRA step / LoRA step": 1.6,
    "LoRA-FA step / LoRA step": 1.15,
    "forward / base": 1.5,
    "generation / base": 1.5,
    "mixed batch / one adapter": 2.5,
    "step with 16 adapters loaded / with one": 1.2,
    "saved bytes / frozen": 1.1,
    "LoRA-FA saved bytes / frozen": 1.05,
    "dropout's bytes / (M K)": 0.3,
}
BF16 = torch.bfloat16
ROUNDS, MORE = 5, 3  # MORE times as many rounds before a margin is said to be passed


def lora(base: nn.Module, *names: str, **options: Any) -> Any:
    """All-linear LoRA that is off its start, on the weights of `base`."""
    config = veneer.LoraConfig(**{"r": 8, "target_modules": "all-linear", **options})
    model = veneer.get_peft_model(twin(base), config, names[0] if names else "default")
    for name in names[1:]:
        model.add_adapter(name, config)
    scramble(model)
    return model.train()


def within(what: str, run: Callable[[], Any], against: Callable[[], Any]) -> None:
    """Pass as soon as the best time of one is within the margin of the best of the other."""
    best = [float("inf"), float("inf")]
    for i in range(1 + ROUNDS * MORE):
        for at, one in enumerate((run, against)):
            start = time.perf_counter()
            one()
            if i:
                best[at] = min(best[at], time.perf_counter() - start)
        if i >= ROUNDS and best[0] <= MARGINS[what] * best[1]:
            return
    assert best[0] <= MARGINS[what] * best[1], f"{what}: {best[0] / best[1]:.2f}, at most {MARGINS[what]}"


@pytest.fixture(scope="module")
def base() -> Any:
    return llama(256, 4)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return drawn(2, 64)


def test_step(base: Any, ids: Tensor) -> None:
    within("step / frozen", partial(step, lora(base), ids), partial(step, floor(base), ids))


def test_step_with_dropout(base: Any, ids: Tensor) -> None:
    model = lora(base, lora_dropout=0.1)
    within("step with dropout / frozen", partial(step, model, ids), partial(step, floor(base), ids))


def test_dora_step(base: Any, ids: Tensor) -> None:
    within("DoRA step / LoRA step", partial(step, lora(base, use_dora=True), ids), partial(step, lora(base), ids))


def test_step_with_frozen_A(base: Any, ids: Tensor) -> None:
    model = lora(base)
    freeze_A(model)
    within("LoRA-FA step / LoRA step", partial(step, model, ids), partial(step, lora(base), ids))


def test_adapters_that_are_only_loaded(base: Any, ids: Tensor) -> None:
    many = lora(base, *(f"a{i}" for i in range(16)))
    many.set_adapter("a0")
    within("step with 16 adapters loaded / with one", partial(step, many, ids), partial(step, lora(base), ids))


@torch.no_grad()
def test_forward(base: Any, ids: Tensor) -> None:
    forward = {"input_ids": ids, "use_cache": False}
    within("forward / base", partial(lora(base).eval(), **forward), partial(twin(base), **forward))


@torch.no_grad()
def test_generation(base: Any) -> None:
    options = {
        "input_ids": drawn(1, 8),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    within("generation / base", partial(lora(base).eval().generate, **options), partial(twin(base).generate, **options))


@torch.no_grad()
def test_mixed_batch(base: Any) -> None:
    names = [f"a{i}" for i in range(16)]
    model, forward = lora(base, *names).eval(), {"input_ids": drawn(16, 16), "use_cache": False}
    model.set_adapter("a0")
    within("mixed batch / one adapter", partial(model, **forward, adapter_names=names), partial(model, **forward))


@pytest.mark.parametrize("measure", [saved, held])
@pytest.mark.parametrize("kind", ["LoRA-FA saved bytes / frozen", "saved bytes / frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_bytes_kept_for_the_backward(kind: str, measure: Callable[..., int], dtype: torch.dtype) -> None:
    own, ids = llama(256, 2, dtype=dtype), drawn(4, 256)
    model, frozen = lora(own), floor(own)
    model.enable_input_require_grads()  # as the frozen one, whose first layer otherwise keeps more
    if "FA" in kind:
        freeze_A(model)
    counts = [measure(lambda m=m: m(input_ids=ids, labels=ids, use_cache=False).loss, m) for m in (model, frozen)]
    assert counts[0] <= MARGINS[kind] * counts[1], f"{kind}: {counts[0] / counts[1]:.3f}, at most {MARGINS[kind]}"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@pytest.mark.parametrize("measure", [saved, held])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_bytes_that_dropout_keeps(measure: Callable[..., int], dtype: torch.dtype) -> None:
    own, x = Linear().to(dtype).requires_grad_(False), torch.randn(256, 256, dtype=dtype).requires_grad_()
    counts = []
    for p in (0.1, 0.0):
        model = lora(own, target_modules=["proj"], lora_dropout=p)
        counts.append(measure(lambda m=model: m(x), model, x))
    extra, most = (counts[0] - counts[1]) / x.numel(), MARGINS["dropout's bytes / (M K)"]
    assert extra <= most, f"{extra:.2f} bytes an entry of the input, at most {most}"


def test_what_is_kept_is_counted(ids: Tensor) -> None:
    """Both measures see what a function saves; only one what it hides."""
    x = torch.randn(64, 64, requires_grad=True)  # 16,384 bytes

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, hidden: bool) -> Tensor:
            copy = x.clone()
            if hidden:
                ctx.copy = copy
            else:
                ctx.save_for_backward(copy)
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            raise AssertionError

    for hidden, seen in ((False, 16_384), (True, 0)):
        run = partial(Kept.apply, x, hidden)
        assert saved(run, nn.Identity(), x) == seen
        assert 16_384 <= held(run, nn.Identity(), x) <= 16_388  # and the sum itself
