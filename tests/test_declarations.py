"""What `@method` and the declarations of tensors refuse when a class is defined, instead of ignoring it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer.algebra.operators import Diagonal
from veneer.io import locate
from veneer.methods import config, peft_types
from veneer.methods.base import Method
from veneer.methods.fields import TargetFields
from veneer.methods.registry import HOOKS, METHODS, method
from veneer.methods.tensors import Constant, Trained


@pytest.fixture(autouse=True)
def registered() -> Any:
    """Methods that a test registers are gone after it."""
    METHODS.items()  # all files are imported
    before, public = dict(config.REGISTRY), dict(peft_types.PUBLIC)
    yield
    for table, old in ((config.REGISTRY, before), (peft_types.PUBLIC, public)):
        table.clear()
        table.update(old)


def none(*args: Any) -> None:
    return None


def define(*hooks: str, **body: Any) -> Any:
    names: dict[str, Any] = {"tensors": {"t": Trained("toy_t")}, **dict.fromkeys(hooks, none), **body}
    return method("TOY")(dataclass(type("ToyConfig", (Method,), names)))


@pytest.mark.parametrize(
    ("hooks", "acts_on", "said"),
    [
        ((), "layers", "none of delta"),
        (("objective",), "layers", "objective, which nothing calls"),
        (("delta", "objective"), "layers", "objective, which nothing calls"),
        (("delta", "prompt"), "layers", "delta, which nothing calls"),
        (("post", "prefix"), "layers", "post, which nothing calls"),
        (("post", "shift"), "modules", "shift, which nothing calls"),
        (("delta",), "modules", "delta, which nothing calls"),
        (("prompt", "post"), "modules", "post, which nothing calls"),
        (("delta",), "copies", "delta, which nothing calls"),
    ],
)
def test_hooks_that_nothing_calls_are_refused(hooks: tuple[str, ...], acts_on: str, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        define(*hooks, acts_on=acts_on)
    assert "TOY" not in METHODS


def test_what_a_method_acts_on_follows_from_its_hooks() -> None:
    assert define("delta", "shift").acts_on == "layers"
    assert define("prompt", "objective").acts_on == "stacks"
    assert define("prefix").acts_on == "stacks"
    assert define("post", acts_on="modules").acts_on == "modules"
    for cls in METHODS.values():
        assert set(cls.hooks) <= set(HOOKS)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"t": "toy_t"}, "declare it as Trained"),
        ({"t": Trained()}, "would be lost"),
        ({"t": Constant("toy_t", shared="adapter")}, "nothing makes it"),
        ({"t": Trained("a", shared="first"), "u": Trained("b")}, "either all tensors"),
    ],
)
def test_tensors_that_would_be_lost_are_refused(tensors: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        define("delta", tensors=tensors)


def saved_scale(**options: Any) -> Any:
    """A method with a saved constant: y = c t (W x), c drawn at the start."""

    def init(self: Any, site: Any) -> Any:
        return {"t": site.ones(1), "c": site.normal(1), **({"more": site.zeros(1)} if options else {})}

    def left(self: Any, p: Any, site: Any) -> Any:
        return Diagonal((p["t"] * p["c"]).expand(site.fan_out))

    body = {
        "init": init,
        "left": left,
        "tensors": {"t": Trained("toy_t"), "c": Constant("toy_c")},
        "__module__": __name__,
    }
    return method("TOY")(dataclass(type("ToyConfig", (TargetFields, Method), body)))


def test_a_saved_constant_is_in_the_file_and_keeps_its_value(tmp_path: Path) -> None:
    cls = saved_scale()
    base = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    model = veneer.get_peft_model(base, cls(target_modules=["0"]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.0.toy_t:default"]
    wanted = model(x)
    model.save_pretrained(tmp_path)
    keys = locate.read_tensors(str(tmp_path / locate.WEIGHTS_NAME)).keys()
    assert sorted(keys) == ["base_model.model.0.toy_c", "base_model.model.0.toy_t"]
    fresh = nn.Sequential(nn.Linear(4, 4))
    fresh.load_state_dict({"0.weight": base[0].weight, "0.bias": base[0].bias})
    assert torch.equal(veneer.PeftModel.from_pretrained(fresh, tmp_path)(x), wanted)


def test_a_tensor_that_is_not_declared_is_refused() -> None:
    cls = saved_scale(more=True)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="'more' that it does not declare; its tensors are 't', 'c'"):
        veneer.get_peft_model(model, cls(target_modules=["0"]))
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
