"""The training hooks of methods (project, penalty, constrain, step) act in any loop, or say that they cannot."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from small import llama
from test_processes import HERE, free_port, run
from veneer.algebra.low_rank import Factored
from veneer.files import adapterhub, state_dict
from veneer.methods import config, peft_types
from veneer.methods.base import Method
from veneer.methods.fields import TargetFields
from veneer.methods.hooks import AtSite
from veneer.methods.registry import METHODS, method
from veneer.methods.tensors import Constant, Trained

IDS = torch.arange(2, 12)[None]  # (1, 10)
EPS = 1e-3


@dataclass
class Toy(TargetFields, Method):
    """W' = W + a a^T, with the hooks of its subclasses."""

    tensors = {"a": Trained("toy_a"), "count": Constant("toy_count")}

    def init(self, site: Any) -> Any:
        return {"a": site.full(0.1, site.fan_in, 1), "count": site.zeros(1)}

    def delta(self, p: Any, site: Any) -> Any:
        return Factored(p["a"], p["a"].T, 1.0)


def bounded(self: Any, p: Any, site: Any) -> Any:
    return {"a": p["a"].clamp(-0.1, 0.1)}


def flattened(self: Any, grads: Any, p: Any, site: Any) -> Any:
    return {"a": grads["a"].mean().expand_as(grads["a"])}


def shrinking(self: Any, p: Any, site: Any) -> Any:
    return 3.0 * p["a"].square().sum()


def counting(self: Any, t: int, places: Sequence[AtSite]) -> None:
    for place in places:
        place.tensors["count"].fill_(float(t))
        assert place.gradients["a"].shape == place.tensors["a"].shape


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    METHODS.items()
    before, public = dict(config.REGISTRY), dict(peft_types.PUBLIC)
    yield
    for table, old in ((config.REGISTRY, before), (peft_types.PUBLIC, public)):
        table.clear()
        table.update(old)


def toy(**hooks: Any) -> Any:
    return method("TOY")(dataclass(type("ToyConfig", (Toy,), {"__doc__": "A toy.", "__module__": __name__, **hooks})))


def linear(**hooks: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4).double()).double()
    return veneer.get_peft_model(base, toy(**hooks)(target_modules=["0"])), torch.randn(5, 4).double()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def steps(model: Any, x: Tensor, optimizer: Any, n: int = 3) -> None:
    for _ in range(n):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "groups": lambda p: torch.optim.RMSprop([{"params": [q], "lr": 0.1} for q in p]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_constraints_hold_after_every_step(name: str) -> None:
    model, x = linear(constrain=bounded)
    optimizer = OPTIMIZERS[name](trained(model))
    for _ in range(3):
        steps(model, x, optimizer, 1)
        (a,) = trained(model)
        assert float(a.detach().abs().max()) <= 0.1
    free, _ = linear(constrain=lambda self, p, site: {})
    steps(free, x, OPTIMIZERS[name](trained(free)), 3)
    assert not torch.equal(trained(free)[0], a)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_projected_before_every_step(name: str) -> None:
    model, x = linear(project=flattened)
    (a,) = trained(model)
    steps(model, x, OPTIMIZERS[name](trained(model)))
    assert torch.allclose(a, a[0].expand_as(a), rtol=1e-12, atol=0) and not torch.equal(a, torch.full_like(a, 0.1))


def test_the_penalty_is_in_the_gradient_once() -> None:
    model, x = linear(penalty=shrinking)
    (a,) = trained(model)
    before = a.detach().clone()
    loss = model(x).square().sum()
    (own,) = torch.autograd.grad(loss, a)
    steps(model, x, torch.optim.SGD([a], lr=1e-3), 1)
    torch.testing.assert_close(a.detach(), before - 1e-3 * (own + 6.0 * before), rtol=1e-12, atol=0)


def test_a_loop_may_add_the_penalty_itself() -> None:
    model, x = linear(penalty=shrinking)
    (a,) = trained(model)
    before = a.detach().clone()
    optimizer = torch.optim.SGD([a], lr=1e-3)
    (own,) = torch.autograd.grad(model(x).square().sum(), a)
    for _ in range(2):  # asked for in one step, not in the next
        with torch.no_grad():
            a.copy_(before)
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss = loss + veneer.penalty(model) if _ == 0 else loss
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(a.detach(), before - 1e-3 * (own + 6.0 * before), rtol=1e-12, atol=0)


def test_the_penalty_is_not_scaled_by_a_grad_scaler() -> None:
    for fused in (False, True):
        model, x = linear(penalty=shrinking)
        (a,) = trained(model)
        before = a.detach().clone()
        (own,) = torch.autograd.grad(model(x).square().sum(), a)
        optimizer = torch.optim.SGD([a], lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(a.detach(), before - 1e-3 * (own + 6.0 * before), rtol=1e-6, atol=0)


def test_steps_are_counted_and_the_count_is_saved(tmp_path: Path) -> None:
    model, x = linear(step=counting)
    steps(model, x, torch.optim.SGD(trained(model), lr=1e-3), 4)
    assert model.base_model.model[0]._buffers["toy_count:default"].item() == 4
    state_dict.save_training_state(model, "default", tmp_path)
    again, _ = linear(step=counting)
    state_dict.load_training_state(again, "default", tmp_path)
    steps(again, x, torch.optim.SGD(trained(again), lr=1e-3), 1)
    assert again.base_model.model[0]._buffers["toy_count:default"].item() == 5


def test_only_adapters_that_the_optimizer_holds_are_acted_on() -> None:
    model, x = linear(constrain=bounded)
    model.add_adapter("second", model.peft_config["default"])
    first, second = trained(model)
    with torch.no_grad():
        second.fill_(0.5)
    steps(model, x, torch.optim.SGD([first], lr=0.1))
    assert float(second.detach().min()) == 0.5
    model.set_adapter("second")
    steps(model, x, torch.optim.SGD([second], lr=1e-9))
    assert float(second.detach().max()) <= 0.1
    model.set_adapter("default")
    model.set_requires_grad("second", False)
    with torch.no_grad():
        second.fill_(0.5)
    steps(model, x, torch.optim.SGD([first, second], lr=0.1))
    assert float(second.detach().min()) == 0.5  # frozen


def test_copies_and_plain_injection_too() -> None:
    model, x = linear(constrain=bounded)
    other = copy.deepcopy(model)
    steps(other, x, torch.optim.SGD(trained(other), lr=10.0))
    assert float(trained(other)[0].detach().abs().max()) <= 0.1
    base = nn.Sequential(nn.Linear(4, 4).double())
    veneer.inject_adapter_in_model(toy(constrain=bounded)(target_modules=["0"]), base)
    steps(base, x, torch.optim.SGD(trained(base), lr=10.0))
    assert float(trained(base)[0].detach().abs().max()) <= 0.1


def test_a_loop_without_an_optimizer_is_told() -> None:
    model, x = linear(constrain=bounded)
    (a,) = trained(model)
    with pytest.raises(RuntimeError, match=r"training hooks \(constrain\).*torch.optim.Optimizer"):
        for _ in range(2):
            a.grad = None
            model(x).square().sum().backward()
            a.data -= 0.1 * a.grad


def test_values_may_be_loaded_between_two_backward_passes() -> None:
    model, x = linear(constrain=bounded)
    (a,) = trained(model)
    model(x).square().sum().backward()
    veneer.set_peft_model_state_dict(model, {k: t + 1 for k, t in veneer.get_peft_model_state_dict(model).items()})
    model(x).square().sum().backward()
    torch.optim.SGD([a], lr=0.1).step()
    assert float(a.detach().abs().max()) <= 0.1


class Around(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead is."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_an_optimizer_around_another_acts_once() -> None:
    found = []
    for wrapped in (False, True):
        model, x = linear(penalty=shrinking, step=counting, project=flattened, constrain=bounded)
        optimizer: Any = torch.optim.SGD(trained(model), lr=1e-3)
        optimizer = Around(optimizer) if wrapped else optimizer
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert model.base_model.model[0]._buffers["toy_count:default"].item() == 3
        found.append(trained(model)[0].detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_an_adapter_without_a_gradient_is_let_be() -> None:
    model, x = linear(penalty=shrinking, constrain=bounded)
    model.add_adapter("second", model.peft_config["default"])
    first, second = trained(model)
    with torch.no_grad():
        second.fill_(0.5)
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert second.detach().unique().tolist() == [0.5] and second.grad is None


def test_a_second_adapter_without_an_optimizer_is_told_too() -> None:
    model, x = linear(constrain=bounded)
    steps(model, x, torch.optim.SGD(trained(model), lr=0.1), 2)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    second = trained(model)[1]
    with pytest.raises(RuntimeError, match="without one"):
        for _ in range(2):
            second.grad = None
            model(x).square().sum().backward()
            second.data -= 0.1 * second.grad


def test_hooks_go_with_the_last_adapter_and_closures_may_return_nothing() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    model, x = linear(penalty=shrinking)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)

    def closure() -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()

    optimizer.step(closure)
    before = len(hooks)
    model.add_adapter("plain", veneer.LoraConfig(target_modules=["0"]))
    model.delete_adapter("default")
    optimizer.step()
    assert len(hooks) <= before


def test_a_frozen_adapter_and_other_methods_leave_no_hook() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    before = len(hooks)
    veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(target_modules=["0"]))
    veneer.get_peft_model(nn.Sequential(nn.Linear(64, 64)), veneer.OFTConfig(target_modules=["0"]))
    assert len(hooks) == before


# The first users.


def coft() -> Any:
    torch.manual_seed(0)
    return veneer.get_peft_model(
        llama().double(),
        veneer.OFTConfig(oft_block_size=4, coft=True, eps=EPS, target_modules=["q_proj", "embed_tokens"]),
    )


def cpt() -> Any:
    torch.manual_seed(0)
    made = veneer.CPTConfig(cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4])
    return veneer.get_peft_model(llama().double(), made)


@pytest.mark.parametrize("make", [coft, cpt])
def test_no_forward_changes_a_tensor(make: Any) -> None:
    model = make()
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p))  # far outside
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = []
    for training in (False, True):
        model.train(training)
        outputs.append(model(input_ids=IDS, labels=IDS).logits.detach())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=0)
    inside = copy.deepcopy(model).eval()
    steps_of(inside, lr=0.0)
    torch.testing.assert_close(inside(input_ids=IDS).logits, outputs[0], rtol=1e-9, atol=1e-12)


def steps_of(model: Any, lr: float = 0.1, n: int = 1) -> None:
    optimizer = torch.optim.SGD(trained(model), lr=lr)
    for _ in range(n):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def test_cofts_rotations_stay_in_their_ball() -> None:
    model = coft()
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p))
    steps_of(model)
    for q in trained(model):  # (blocks, b (b - 1) / 2)
        radius = EPS / q.shape[0] ** 0.5
        norm = (2 * q.detach().square().sum(1)).sqrt()
        assert float(norm.max()) <= radius * (1 + 2e-5) and float(norm.max()) > radius * 0.9


def test_cpts_tokens_stay_in_their_balls() -> None:
    model = cpt()
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p))
    steps_of(model)
    (delta,) = trained(model)
    eps = 0.1 * (delta.shape[1] / 2048) ** 0.5
    assert (delta.detach().norm(dim=1)[:3] <= eps * (1 + 1e-6)).all()


def test_fusion_is_trained_with_its_penalty() -> None:
    from models import MODELS
    from test_bottleneck import fused

    found = []
    for regularized in (True, False):
        model = fused("llama")
        model.peft_config["fusion"].regularization = regularized
        for site in model.runtime.places["fusion"]:
            site.entries["fusion"].method.regularization = regularized
        own = model.runtime.training_state("fusion")
        with torch.no_grad():
            for key, p in own.items():
                p.add_(0.1 if key.endswith("|value") else 0.0)
        optimizer = torch.optim.SGD([p for p in own.values() if p.requires_grad], lr=1.0)
        model(**MODELS["llama"].inputs()).loss.backward()
        optimizer.step()
        found.append({k: p.detach().clone() for k, p in own.items()})
        gap = adapterhub.fusion_regularization(model, "fusion")
        assert (gap > 0) == regularized
    for key, with_penalty in found[0].items():
        changed = with_penalty - found[1][key]
        if key.endswith("|value"):  # the gradient of 0.01 sum |V - I|^2 at V - I = 0.1 + (start)
            assert torch.allclose(changed, torch.full_like(changed, -0.02 * 0.1), rtol=1e-2, atol=0)
        else:
            assert not changed.any()


# Frameworks.


def test_under_accelerate() -> None:
    from accelerate import Accelerator

    model, x = linear(constrain=bounded, penalty=shrinking, step=counting)
    (a,) = trained(model)
    with torch.no_grad():
        a.fill_(0.09)
    before = a.detach().clone()
    (own,) = torch.autograd.grad(model(x).square().sum(), a)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD([a], lr=1e-4))
    for _ in range(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(x).square().sum())
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(a.detach(), before - 1e-4 * (own + 6.0 * before), rtol=1e-12, atol=0)
    assert model.base_model.model[0]._buffers["toy_count:default"].item() == 1


@pytest.mark.parametrize("layout", ["fsdp2", "zero1", "zero2", "zero3"])
def test_on_two_processes(layout: str, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    run([*start, str(HERE / "training_words_step.py"), layout, str(tmp_path)])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["largest"] <= EPS * (1 + 1e-3) and found["largest"] > EPS * 0.9
    assert found["saved"] == found["largest"] or layout == "fsdp2"
    if layout != "fsdp2":
        assert "ZeRO keeps the gradients to itself" in found["refused"]
