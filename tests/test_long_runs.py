"""The long and the concurrent runs of `python -m tests.soak`, at a small size; and that they would see a fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import veneer
from soak import concurrency, long_runs
from veneer.injection import router
from veneer.lifecycle.adapters import Runtime
from veneer.model import controls

EVERY = [*concurrency.SCENARIOS, *long_runs.SCENARIOS]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "run", "full", "small", "bar"), EVERY, ids=[s[0] for s in EVERY])
def test_at_a_small_size(name: str, run: Any, full: int, small: int, bar: str) -> None:
    figures = run(small)
    assert figures["ok"], figures


def test_a_choice_that_all_threads_share_is_seen(monkeypatch: Any) -> None:
    class Everywhere:
        __init__ = router.Local.__init__

    monkeypatch.setattr(router, "Local", Everywhere)
    assert not concurrency.threads_generate(1)["ok"]


def test_an_adapter_that_is_kept_is_seen(monkeypatch: Any) -> None:
    kept, delete = [], controls.delete_adapter

    def keeping(self: Runtime, adapter: str) -> None:
        kept.append(list(self.parameters(adapter)))
        delete(self, adapter)

    monkeypatch.setattr(controls, "delete_adapter", keeping)
    figures = long_runs.loads(8)
    assert not figures["ok"] and figures["objects left"]["tensors"] > 8


def test_a_bit_that_changes_is_seen(monkeypatch: Any) -> None:
    unmerge = controls.unmerge_adapters

    def rounding(self: Runtime, *args: Any) -> Any:
        made = unmerge(self, *args)
        with torch.no_grad():
            self.root.lm_head.weight[0, 0] += 0.01  # type: ignore[union-attr, index, operator]
        return made

    monkeypatch.setattr(controls, "unmerge_adapters", rounding)
    monkeypatch.setattr(long_runs, "STORES", ("bf16",))
    assert not long_runs.merges(2)["ok"]


def test_no_adapter_in_one_thread_only() -> None:
    """`disable_adapter` is for the whole model; an empty choice is for this thread."""
    model = concurrency.model_of_many()
    ids = concurrency.prompts()[0]
    with model.disable_adapter():
        alone = concurrency.one(model, ("logits", []), ids)
    active = concurrency.one(model, ("active", None), ids)
    with model.use_adapter([]):
        there: list[torch.Tensor] = []
        raised = concurrency.in_threads(1, lambda i: there.append(concurrency.one(model, ("active", None), ids)))
        here = concurrency.one(model, ("logits", []), ids)
    assert (
        not raised
        and torch.equal(there[0], active)
        and torch.equal(here, alone)
        and not torch.equal(here, there[0][:1])
    )
    assert isinstance(model, veneer.PeftModel)
