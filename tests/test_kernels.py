"""Kernels against the operators' own `apply`: outputs and all gradients, and everything that can go on around them."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.activations import ACT2FN

import veneer
from models import IDS as TOKENS
from models import MODELS
from small import deviation, llama, scramble
from veneer.algebra import modes
from veneer.kernels import decode, dropout, gated, linear, scratch, structure

pytestmark = pytest.mark.filterwarnings("ignore")

PATHS = {"composed": (1 << 62, math.inf), "function": (0, math.inf), "merged": (0, 0.0)}  # SMALL, MERGE


@pytest.fixture(params=PATHS)
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which a kernel may compute a layer."""
    set_path(monkeypatch, request.param)
    return str(request.param)


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> None:
    set_path(monkeypatch, "function")


def set_path(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(linear, "SMALL", PATHS[name][0])
    monkeypatch.setattr(linear, "MERGE", PATHS[name][1])


class Attention(nn.Module):
    """q, k and v of GQA widths on one input, and o."""

    def __init__(self, bias: bool = False, width: int = 32) -> None:
        super().__init__()
        self.q = nn.Linear(width, width, bias)
        self.k = nn.Linear(width, width // 2, bias)
        self.v = nn.Linear(width, width // 2, bias)
        self.o = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        return self.o(torch.cat([q[..., : k.shape[-1]] * k, v], -1))


class Gated(nn.Module):
    def __init__(self, act: Any = "silu", bias: bool = False, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 48, bias)
        self.up = nn.Linear(width, 48, bias)
        self.down = nn.Linear(48, width, bias)
        self.act = ACT2FN[act] if isinstance(act, str) else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class One(nn.Module):
    def __init__(self, bias: bool = False, width: int = 32) -> None:
        super().__init__()
        self.q = nn.Linear(width, 24, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


class Pair(nn.Module):
    """Two outputs, of which one may go unused."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x)
        return q, self.k(x)


ALL = ["q", "k", "v", "o", "gate", "up", "down"]


def adapted(base: nn.Module, dtype: torch.dtype = torch.float64, *, targets: Any = ALL, **options: Any) -> Any:
    """`base` with LoRA that is no longer at its start; every call gives the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape) / math.sqrt(p.shape[-1]))
    if isinstance(targets, list):
        targets = [t for t in targets if any(n.rpartition(".")[2] == t for n, _ in base.named_modules())]
    model = veneer.get_peft_model(base.to(dtype), veneer.LoraConfig(**{"r": 4, "target_modules": targets, **options}))
    scramble(model)
    return model.eval()


def inputs(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def step(model: nn.Module, x: Any, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter, of one step."""
    model.zero_grad()
    if isinstance(x, Tensor):
        x.grad = None
    y = (run or model)(x)
    y = getattr(y, "logits", y)
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"y": y.detach()} | ({"x": x.grad.clone()} if x.grad is not None else {})


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal keys, dtypes and, relative to the largest entry of each tensor, values."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape, name
        if not t.numel():
            continue
        wrong = (found[name].double() - t.double()).abs().max().item() / max(t.double().abs().max().item(), 1e-30)
        assert wrong <= tolerance, f"{name}: {wrong}"


def matches(model: nn.Module, x: Any, tolerance: float = 1e-10, *, taken: int | None = None) -> None:
    """A step with kernels is that of the reference; `taken` calls of modules were served by kernels."""
    with modes.reference_only():
        expected = step(model, x)
    with Served() as served:
        close(step(model, x), expected, tolerance)
    with torch.no_grad():  # another path
        y = model(x)
        close({"y": getattr(y, "logits", y)}, {"y": expected["y"]}, tolerance)
    assert len(expected) > 1
    assert bool(served.calls) if taken is None else served.calls == taken, served.calls


class Served:
    """Counts the products that kernels make: `run` of linear and of gated."""

    def __enter__(self) -> Served:
        self.calls = 0
        self.shares: list[int] = []
        self.before = linear.run, gated.run
        linear.run, gated.run = self.counted(linear.run), self.counted(gated.run)
        return self

    def counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            made = run(*args)
            if made is not None:
                self.calls += 1
                self.shares.append(len(args[-1]))
            return made

        return counting

    def __exit__(self, *_: Any) -> None:
        linear.run, gated.run = self.before


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_dora": {"init_lora_weights": "pissa", "use_dora": True},
    "patterns": {"rank_pattern": {"q": 2, "up": 7}, "alpha_pattern": {"k": 1, "gate": 32, "down": 5}},
}
BASES = {"one": One, "attention": Attention, "gated": Gated}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", BASES)
def test_float64(base: str, config: str, bias: bool, path: str) -> None:
    model = adapted(BASES[base](bias=bias), **CONFIGS[config])
    matches(model, inputs(2, 5, 32), taken={"one": 1, "attention": 2, "gated": 1}[base])


@pytest.mark.parametrize("base", BASES)
def test_float32(base: str, path: str) -> None:
    matches(adapted(BASES[base](bias=True), torch.float32), inputs(40, 32, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_half_precision_is_as_far_from_float32_as_the_reference(
    base: str, options: dict[str, Any], dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values in float32 tell who is off."""
    monkeypatch.setattr(scratch, "CHUNK", 16 * 24 * 2)  # several pieces
    low = adapted(BASES[base](bias=True), dtype, **options)
    for name, p in low.named_parameters():
        if name.endswith(".bias"):
            p.data.mul_(30)
    high = copy.deepcopy(low).float()
    x = inputs(2000, 32, dtype=dtype)
    exact = step(high, x.detach().float().requires_grad_())
    with modes.reference_only():
        reference = step(low, x)
    found = step(low, x)
    assert found.keys() == reference.keys()
    for name, t in exact.items():
        assert found[name].dtype == reference[name].dtype
        scale = t.abs().max()
        ours, theirs = ((f[name].float() - t).abs().max() / scale for f in (found, reference))
        assert ours <= 2 * theirs + 2 * torch.finfo(dtype).eps, (name, ours, theirs)


class Dtypes(TorchDispatchMode):
    """The dtypes of what operations make, of sizes that are those of activations."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.found = rows, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, Tensor) and t.ndim == 2 and t.shape[0] == self.rows and t.is_floating_point():
                self.found.add(t.dtype)
        return made


@pytest.mark.parametrize("act", [None, "silu", "gelu", "gelu_new", "relu2"])
def test_autocast_casts_activations_down_once_and_never_up(act: str | None, path: str) -> None:
    model, x = (
        adapted(Gated(act) if act else Attention(), torch.float32),
        inputs(37, 32, dtype=torch.float32, grad=False),
    )
    exact = step(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        with modes.reference_only():
            reference = step(model, x)
        with Dtypes(37) as seen, torch.no_grad():
            assert model(x).dtype == torch.bfloat16
        assert seen.found == {torch.bfloat16}
        found = step(model, x)
    assert found.keys() == reference.keys() == exact.keys()
    for name, t in exact.items():
        assert found[name].dtype == reference[name].dtype, name
        ours, theirs = ((f[name].float() - t).abs().max() / t.abs().max() for f in (found, reference))
        assert ours <= 2 * theirs + 0.02, (name, ours, theirs)


@pytest.mark.parametrize(
    "act", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", nn.Mish()]
)
def test_activations(act: Any, path: str) -> None:
    matches(adapted(Gated(act)), inputs(7, 32), taken=1)


@pytest.mark.parametrize("act", [nn.PReLU(), nn.SiLU(inplace=True), nn.Dropout(0.5), nn.Softplus()])
def test_activations_that_cannot_be_computed_twice_run_on_their_own(act: nn.Module, path: str) -> None:
    matches(adapted(Gated(act)), inputs(7, 32), taken=2)  # gate with up, and down


@pytest.mark.parametrize(
    ("base", "targets", "taken"),
    [(Attention, ["q", "v"], 1), (Attention, ["k"], 1), (Gated, ["gate", "up"], 1), (Gated, ["up", "down"], 2),
     (Gated, ["down"], 1)],
)  # fmt: skip
def test_only_some_layers_have_adapters(base: Any, targets: list[str], taken: int, path: str) -> None:
    matches(adapted(base(bias=True), targets=targets), inputs(9, 32), taken=taken)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (0, 32), (2, 3, 4, 32)])
def test_shapes(shape: tuple[int, ...], path: str) -> None:
    for base in BASES.values():
        model, x = adapted(base(bias=True)), inputs(*shape)
        with modes.reference_only():
            expected = step(model, x) if x.numel() else {"y": model(x)}
        close(step(model, x) if x.numel() else {"y": model(x)}, expected, 1e-10)


def test_inputs_that_are_not_contiguous(path: str) -> None:
    for base in BASES.values():
        x = inputs(32, 7, 2)
        model = adapted(base())
        with modes.reference_only():
            expected = step(model, x, lambda x: model(x.permute(2, 1, 0)))
        close(step(model, x, lambda x: model(x.permute(2, 1, 0))), expected, 1e-10)


ARCHITECTURES = ["llama", "gpt2", "bert", "t5", "bart", "opt", "vit"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = MODELS[name]
    model = adapted(architecture.make(), targets="all-linear", **options)
    given = {k: v.double() if v.is_floating_point() else v for k, v in architecture.inputs().items()}

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with modes.reference_only():
        expected = grads()
    for way in PATHS:
        set_path(monkeypatch, way)
        with Served() as served:
            close(grads(), expected, 1e-9)
        assert served.calls > 3


# What is trained, and what is kept.


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "q.", "gate."])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_frozen_parts(frozen: str, grad: bool, rate: float, path: str) -> None:
    for base in BASES.values():
        model = adapted(base(), lora_dropout=rate).train()
        for name, p in model.named_parameters():
            if frozen in name:
                p.requires_grad_(False)
        x = inputs(9, 32, grad=grad)
        if not grad and not any(p.requires_grad for p in model.parameters()):
            continue
        if not rate:
            matches(model, x)
        else:
            torch.manual_seed(1)
            found = step(model, x)
            assert not any(frozen in n for n in found) and ("x" in found) == grad


def kept_by(run: Callable[[], Any]) -> list[Tensor]:
    """The tensors that autograd keeps in `run`."""
    found: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        run()
    return found


def test_frozen_a_keeps_no_input(function: None) -> None:
    model, x = adapted(Attention(), targets=["q", "k", "v"]), inputs(64, 32)
    everything = {t.untyped_storage().data_ptr() for t in kept_by(lambda: model.base_model.q(x))}
    assert x.untyped_storage().data_ptr() in everything
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    matches(model, x)
    kept = kept_by(lambda: model.base_model.q(x))
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in kept}
    assert {tuple(t.shape) for t in kept if t.shape[0] == 64} == {(64, 4)}


def test_gated_keeps_x_e_g_and_the_low_rank_products(function: None) -> None:
    model, x = adapted(Gated()), inputs(64, 32)
    kept = kept_by(lambda: model(x))
    assert sorted(tuple(t.shape) for t in kept if t.shape[0] == 64) == [(64, 4), (64, 8), (64, 32), (64, 48), (64, 48)]


@pytest.mark.parametrize("used", [0, 1])
def test_a_sibling_whose_output_goes_unused(used: int, path: str) -> None:
    model, x = adapted(Pair()), inputs(9, 32)
    with modes.reference_only():
        expected = step(model, x, lambda x: model(x)[used])
    found = step(model, x, lambda x: model(x)[used])
    if path == "composed":  # one product with all A: the unused one's gradient is zero instead of None
        extra = found.keys() - expected.keys()
        assert all("lora_A" in n and not found[n].any() for n in extra)
        found = {n: t for n, t in found.items() if n not in extra}
    close(found, expected, 1e-10)


# Stacks.


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["stack", "parallel", "average"])
@pytest.mark.parametrize("base", BASES)
def test_several_adapters(base: str, how: str, frozen: bool, path: str) -> None:
    model = adapted(BASES[base](bias=True))
    targets = [t for t in ("q", "v", "gate", "down") if hasattr(model.get_base_model(), t)]
    model.add_adapter("b", veneer.LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    scramble(model, 2)
    made = {"stack": ["default", "b"], "parallel": veneer.Parallel("default", "b"),
            "average": veneer.Average("default", "b", weights=[1, 3])}[how]  # fmt: skip
    model.set_adapter(made)
    if frozen:
        model.set_requires_grad("default", False)
    x = inputs(9, 32)
    with modes.reference_only():
        expected = step(model, x)
    found = step(model, x)
    close(found, expected, 1e-10)
    assert any(":b" in n for n in found) and frozen != any(":default" in n for n in found)


def test_between_calls_adapters_come_and_go(path: str) -> None:
    """Every call, whatever was done before it, is that of the reference, and the classes are given back."""
    model, x = adapted(Gated()), inputs(9, 32)
    base = model.get_base_model()
    plain = step(copy.deepcopy(base), x)["y"] * 0  # has the adapters: only its shape is used

    def same(taken: bool = True) -> None:
        with modes.reference_only(), torch.no_grad():
            expected = model(x)
        with Served() as served, torch.no_grad():
            assert deviation(model(x), expected) <= 1e-10
        assert bool(served.calls) == taken
        assert expected.shape == plain.shape

    same()
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False))
    model.set_adapter("b")
    same()
    with model.disable_adapter():
        same(taken=False)
    with model.use_adapter("default"):
        same()
    model.set_adapter("default")
    model.merge_adapter()
    same(taken=False)
    model.unmerge_adapter()
    same()
    with torch.no_grad():
        before = model(x)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B:default" in n:
                p.mul_(3)
    same()
    with torch.no_grad():
        assert not torch.allclose(model(x), before)
    model.delete_adapter("b")
    same()
    assert type(base) is not Gated
    unloaded = model.unload()
    assert type(unloaded) is Gated and type(unloaded.gate) is nn.Linear
    with torch.no_grad():
        fresh = Gated().double()
        fresh.load_state_dict(unloaded.state_dict())
        assert torch.equal(unloaded(x), fresh(x))


def test_an_adapter_on_part_of_a_network_gives_the_class_back_when_deleted() -> None:
    model = adapted(Gated(), targets=["gate", "up", "down"])
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["down"]))
    base = model.get_base_model()
    model.set_adapter("b")
    model.delete_adapter("default")
    assert type(base) is Gated and type(base.gate) is nn.Linear and "_veneer" in base.down.__dict__
    with torch.no_grad():
        model(inputs(3, 32))


# Dropout.


def bits_of(mask: Tensor, columns: int) -> Tensor:
    """A packed mask as (rows, columns) of 0 and 1, in the order in which `spread` puts it."""
    return (dropout.spread_bits(mask, columns, torch.float64) != 0).to(torch.float64)


@pytest.mark.parametrize("columns", [32, 40, 7])
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
def test_masks_keep_entries_independently(p: float, columns: int) -> None:
    torch.manual_seed(0)
    rows = 160_000 // columns
    kept = torch.stack([bits_of(dropout.draw_mask(rows, columns, p, torch.device("cpu")), columns) for _ in range(2)])
    n, deviation = rows * 2, math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / math.sqrt(kept.numel())
    assert ((kept.mean((0, 1)) - (1 - p)).abs() < 5.5 * deviation / math.sqrt(n)).all(), "each column"
    centred = (kept - (1 - p)) / deviation
    pairs = torch.einsum("crk,crl->kl", centred, centred) / n  # correlation of columns
    off = pairs - torch.diag(pairs.diag())
    assert off.abs().max() < (6 if p > 0.01 else 12) / math.sqrt(n)
    for a, b in ((centred[0], centred[1]), (centred[:, 1:], centred[:, :-1])):  # of calls, and of rows
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("p", [0.5, 0.4])
def test_patterns_of_16_bits_have_the_chances_of_16_draws(p: float) -> None:
    torch.manual_seed(0)
    n = 2**20
    words = dropout.draw_mask(n // 64, 64 * 16, p, torch.device("cpu")).flatten().long() & 0xFFFF
    counts = words.bincount(minlength=2**16).double()
    ones = sum((torch.arange(2**16) >> b) & 1 for b in range(16)).double()
    expected = n * (1 - p) ** ones * p ** (16 - ones)
    common = expected >= 5
    seen, wanted = counts[common], expected[common]
    free = int(common.sum())
    chi = ((seen - wanted) ** 2 / wanted).sum().item()
    assert abs(chi - free) < 6 * math.sqrt(2 * free)
    by_ones = torch.zeros(17, dtype=torch.float64).index_add_(0, ones.long(), counts)
    exact = torch.tensor([n * math.comb(16, k) * (1 - p) ** k * p ** (16 - k) for k in range(17)])
    assert ((by_ones - exact) ** 2 / exact.clamp_min(1)).sum() < 70


def test_masks_follow_the_seed_and_a_default_device() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made += [dropout.draw_mask(9, 33, 0.25, torch.device("cpu")) for _ in range(2)]
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3]) and not torch.equal(made[0], made[1])
    dropout.mask_table.cache_clear()
    scratch._HELD.blocks.clear()
    scratch._HELD.views.clear()
    torch.manual_seed(3)
    with torch.device("meta"):  # where fresh tensors go; not those of a kernel
        assert torch.equal(dropout.draw_mask(9, 33, 0.25, torch.device("cpu")), made[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 40, 7])
@pytest.mark.parametrize("p", [1e-4, 0.3, 0.9])
def test_dropout_is_that_of_its_mask_forward_and_backward(
    p: float, width: int, dtype: torch.dtype, function: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explicit reference with the mask that was drawn."""
    masks: list[Tensor] = []
    draw = dropout.draw_mask

    def noted(*args: Any) -> Tensor:
        masks.append(draw(*args))
        return masks[-1]

    monkeypatch.setattr(dropout, "draw_mask", noted)
    monkeypatch.setattr(scratch, "CHUNK", 16 * width * dtype.itemsize)  # several pieces
    model = adapted(One(width=width), dtype, lora_dropout=p).train()
    layer, x = model.get_base_model().q, inputs(41, width, dtype=dtype)
    found = step(model, x)
    (mask,) = masks
    kept = bits_of(mask, width).to(dtype)
    A, B = layer._parameters["lora_A:default"], layer._parameters["lora_B:default"]

    def explicit(x: Tensor) -> Tensor:
        low = F.linear(F.linear(x * kept, A.to(dtype)), B.to(dtype))
        return F.linear(x, layer.weight, layer.bias) + low * (2 / (1 - p))

    close(found, step(model, x, explicit), {torch.bfloat16: 0.03, torch.float32: 1e-5}.get(dtype, 1e-10))


def test_parts_are_summed_in_float32(function: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a gradient in half precision is the sum of many parts."""
    monkeypatch.setattr(scratch, "CHUNK", 16 * 32 * 2)
    x, masks = inputs(4000, 32, dtype=torch.bfloat16), []
    draw = dropout.draw_mask
    monkeypatch.setattr(dropout, "draw_mask", lambda *args: masks.append(draw(*args)) or masks[-1])
    model = adapted(One(), torch.bfloat16, lora_dropout=0.5).train()
    found = step(model, x)
    monkeypatch.setattr(dropout, "draw_mask", lambda *_: masks[0])
    exact = step(model.double(), x.detach().double().requires_grad_())
    for name in (n for n in found if "lora_A" in n):
        assert (found[name].double() - exact[name]).abs().max() < 0.01 * exact[name].abs().max()
    a, b = inputs(4000, 24, grad=False).abs(), inputs(4000, 24, grad=False).abs()
    dots = linear.column_dots(a.bfloat16(), b.bfloat16()).double()
    assert deviation(dots / (a * b).sum(0), torch.ones(())) < 0.006


def test_a_sweep_of_stacks_is_not_kept() -> None:
    model, x = adapted(Attention()), inputs(3, 32)
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["q", "k"]))
    for i in range(100):
        with torch.no_grad(), model.use_adapter(veneer.Average("default", "b", weights=[i + 1, 1])):
            model(x)
    assert len(model.get_base_model().q._veneer.group.made) <= 64


@pytest.mark.parametrize("base", BASES)
def test_dropout_by_the_seed_only_in_training_and_by_checkpointing(base: str, path: str) -> None:
    model, x = adapted(BASES[base](), lora_dropout=0.4), inputs(11, 32)
    matches(model, x)  # none in eval
    model.train()
    runs: dict[str, Any] = {
        "plain": None,
        "again": None,
        "reentrant": lambda x: checkpoint(model, x, use_reentrant=True),
        "other": lambda x: checkpoint(model, x, use_reentrant=False),
    }
    made = {}
    for name, run in runs.items():
        torch.manual_seed(4)
        made[name] = step(model, x, run)
    for name in runs:
        close(made[name], made["plain"], 1e-12)
    assert not torch.allclose(step(model, x)["y"], made["plain"]["y"])
    torch.manual_seed(4)
    with torch.no_grad():
        assert torch.allclose(model(x), made["plain"]["y"])


def test_the_mean_over_masks_is_the_layer_without(path: str) -> None:
    model, x = adapted(One(), lora_dropout=0.5), inputs(4, 32)
    expected = step(model, x)
    model.train()
    torch.manual_seed(0)
    many = [step(model, x) for _ in range(400)]
    for name, t in expected.items():
        all_of = torch.stack([m[name] for m in many])
        error = (all_of.mean(0) - t).abs() / (all_of.std(0) / 20 + 1e-12)
        assert error.max() < 5, name


def test_what_is_dropped_may_be_anything(function: None) -> None:
    model = adapted(One(), lora_dropout=0.5).train()
    x = inputs(16, 32, grad=False)
    torch.manual_seed(2)
    kept = bits_of(dropout.draw_mask(16, 32, 0.5, x.device), 32)
    A = model.get_base_model().q._parameters["lora_A:default"]
    torch.manual_seed(2)
    mask = dropout.draw_mask(16, 32, 0.5, x.device)
    for bad in (math.nan, math.inf):
        spoilt = torch.where(kept == 1, x, torch.full_like(x, bad))
        assert torch.allclose(dropout.shrink_dropped(mask, spoilt, A.detach(), 0.5), (x * kept) @ A.T)


@pytest.mark.parametrize("base", ["one", "attention"])
def test_dropout_keeps_one_bit_an_entry(base: str, function: None) -> None:
    def size(rate: float) -> int:
        model = adapted(BASES[base](), torch.float32, lora_dropout=rate, targets=["q", "k", "v"]).train()
        x = inputs(64, 32, dtype=torch.float32)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept_by(lambda: model(x))}
        return sum(storages.values())

    assert 0 < size(0.1) - size(0.0) <= 64 * 32 // 8


# Checkpointing, hooks on what is kept, several backwards.


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_checkpointed_layers(reentrant: bool, rate: float, path: str) -> None:
    def make() -> Any:
        model = adapted(llama(tie_word_embeddings=False), targets="all-linear", lora_dropout=rate).train()
        model.get_base_model().enable_input_require_grads()
        return model

    def grads(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(6)
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    checked = make()
    checked.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(grads(checked), grads(make()), 1e-10)


@pytest.mark.parametrize("base", BASES)
def test_selective_checkpointing(base: str, path: str) -> None:
    """It keeps results of operations, into which nothing may be written."""
    model, x = adapted(BASES[base]()), inputs(9, 32)
    saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    found = step(model, x, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts))
    close(found, step(model, x), 1e-10)


@pytest.mark.parametrize("base", BASES)
def test_save_on_cpu(base: str, path: str) -> None:
    model, x = adapted(BASES[base](), lora_dropout=0.3).train(), inputs(9, 32)
    torch.manual_seed(1)
    expected = step(model, x)

    def offloaded(x: Tensor) -> Tensor:
        with save_on_cpu():
            return model(x)

    torch.manual_seed(1)
    close(step(model, x, offloaded), expected, 1e-12)


@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_two_forwards_before_two_backwards_and_a_graph_used_twice(act: str, rate: float, path: str) -> None:
    models = [adapted(nn.Sequential(Gated(act), Attention(), Gated(act)), lora_dropout=rate).train()
              for _ in range(2)]  # fmt: skip
    x = inputs(9, 32)
    torch.manual_seed(1)
    expected = [step(m, x) for m in models]
    for m in models:
        m.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    ys = [m(x) for m in models]
    weights = torch.sin(torch.arange(ys[0].numel(), dtype=torch.float64)).reshape(ys[0].shape)
    for y in ys:
        (y * weights).sum().backward(retain_graph=True)
    once = [{n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None} for m in models]
    for found, wanted in zip(once, expected, strict=True):
        close(found, {n: t for n, t in wanted.items() if n not in ("y", "x")}, 1e-12)
    for y in ys:
        (y * weights).sum().backward()
    for m, first in zip(models, once, strict=True):
        twice = {n: p.grad / 2 for n, p in m.named_parameters() if p.grad is not None}
        close(twice, first, 1e-12)


def test_a_backward_inside_the_hook_of_another(path: str) -> None:
    outer, inner, x = adapted(Gated(), lora_dropout=0.3).train(), adapted(Gated("gelu")), inputs(9, 32)
    base = nn.Sequential(outer, nn.Linear(32, 32, dtype=torch.float64).requires_grad_(False), copy.deepcopy(outer))
    torch.manual_seed(1)
    expected, alone = step(base, x), step(inner, inputs(13, 32))
    seen: list[dict[str, Tensor]] = []

    def hook(*_: Any) -> None:
        with torch.enable_grad():
            seen.append(step(inner, inputs(13, 32)))

    base[1].register_full_backward_hook(hook)
    for p in base.parameters():
        if p.requires_grad:
            p.register_hook(hook)
    torch.manual_seed(1)
    close(step(base, x), expected, 1e-12)
    assert len(seen) > 10
    for found in seen:
        close(found, alone, 1e-12)


def test_threads_train_models_at_once(function: None) -> None:
    models = [adapted(nn.Sequential(Attention(), Gated()), lora_dropout=0.0) for _ in range(3)]
    wrong: list[str] = []
    given = [inputs(3 + i, 32) for i in range(3)]
    expected = [step(m, x) for m, x in zip(models, given, strict=True)]

    def work(i: int) -> None:
        try:
            for _ in range(15):
                close(step(models[i], given[i]), expected[i], 1e-12)
        except BaseException as error:
            wrong.append(repr(error))

    in_threads(*(functools.partial(work, i) for i in range(3)))
    assert not wrong


def in_threads(*work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=w) for w in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def test_threads_run_one_model_with_different_adapters(path: str) -> None:
    model, x = adapted(nn.Sequential(Attention(), Gated())), inputs(5, 32)
    names = ["default", "b", "c", "d"]
    for i, name in enumerate(names[1:]):
        model.add_adapter(name, veneer.LoraConfig(r=2 + i, target_modules=ALL, init_lora_weights=False))
    expected = {}
    for name in names:
        with model.use_adapter(name), modes.reference_only():
            expected[name] = torch.autograd.grad(model(x).sum(), x)[0]
    wrong: list[str] = []

    def work(name: str) -> None:
        try:
            for _ in range(25):
                model.runtime.router.changed()  # plans are made anew, by all at once
                with model.use_adapter(name):
                    found = torch.autograd.grad(model(x).sum(), x)[0]
                if deviation(found, expected[name]) > 1e-10:
                    wrong.append(name)
        except BaseException as error:
            wrong.append(repr(error))

    in_threads(*(functools.partial(work, n) for n in names))
    assert not wrong


def test_a_group_that_two_threads_plan_at_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread plans a group, another's plan takes the place of what it wrote."""
    from veneer.kernels.plan import Group

    model = adapted(Attention())
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules=["q", "k"]))
    layer = model.get_base_model().q
    group, version = layer._veneer.group, object()

    class Racing(Group):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, {} if name == "made" else value)

    group.__class__ = Racing
    assert group.kernel(layer, ("default",), version) is not None


@pytest.mark.parametrize("base", BASES)
def test_a_second_derivative_is_refused_clearly(base: str, function: None) -> None:
    model, x = adapted(BASES[base]()), inputs(5, 32)

    def second() -> None:
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    with pytest.raises(RuntimeError, match="differentiate twice"):
        second()
    with modes.reference_only():
        second()


@pytest.mark.parametrize("base", BASES)
def test_functorch_and_forward_mode_take_the_reference(base: str, path: str) -> None:
    model, x = adapted(BASES[base]()), inputs(5, 32, grad=False)
    t = inputs(5, 32, grad=False).cos()
    model(x)
    assert torch.allclose(torch.func.grad(lambda x: model(x).sum())(x), torch.autograd.grad(
        model(z := x.clone().requires_grad_()).sum(), z)[0])  # fmt: skip
    assert torch.allclose(torch.func.vmap(model)(x), model(x))
    with modes.reference_only():
        expected = torch.func.jvp(model, (x,), (t,))
    for found, wanted in zip(torch.func.jvp(model, (x,), (t,)), expected, strict=True):
        assert torch.allclose(found, wanted)
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, t))
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected[1])
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    given = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    found = step(model, x, model)
    model.zero_grad()
    model(x).sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(given[n], p.grad), n
    assert found
    doubled = {n: p * 2 for n, p in parameters.items()}
    with modes.reference_only():
        expected_y = torch.func.functional_call(model, doubled, (x,))
    assert torch.allclose(torch.func.functional_call(model, doubled, (x,)), expected_y)


@pytest.mark.parametrize("base", BASES)
def test_modes_without_gradients(base: str, path: str) -> None:
    model, x = adapted(BASES[base]()), inputs(5, 32, grad=False)
    with modes.reference_only(), torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.allclose(model(x), expected) and torch.allclose(model(x.clone()), expected)
    with torch.no_grad():
        y = model(x)
        assert torch.allclose(y, expected) and not y.requires_grad
    matches(model, inputs(5, 32))  # whatever inference mode left in scratch memory


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_trained_gets_its_gradients(base: str, what: str, path: str) -> None:
    model = adapted(BASES[base](bias=True))
    for name, p in model.named_parameters():
        if name.endswith(f".{what}"):
            p.requires_grad_(True)
    x = inputs(5, 32)
    with modes.reference_only():
        expected = step(model, x)
    found = step(model, x)
    close(found, expected, 1e-10)
    assert any(n.endswith(f".{what}") for n in found)


@pytest.mark.parametrize("path", ["composed", "function"], indirect=True)
def test_tensors_without_data_and_of_other_classes_decline(path: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for base in BASES.values():
        model = adapted(base(), torch.float32, lora_dropout=0.3).train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.randn(5, 32)).shape[0] == 5
        meta = copy.deepcopy(model).to("meta")
        meta(torch.randn(5, 32, device="meta")).sum().backward()

        class Own(Tensor):
            pass

        y = model(torch.randn(5, 32).as_subclass(Own))
        assert type(y) is Own
        torch.manual_seed(1)
        expected = step(model, x := inputs(5, 32, dtype=torch.float32))
        torch.manual_seed(1)
        close(step(model, x), expected, 1e-6)


def test_a_trace_holds_operations_only(path: str) -> None:
    for base in BASES.values():
        model, x = adapted(base()).get_base_model(), inputs(5, 32, grad=False)
        traced, file = torch.jit.trace(model, x), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert torch.allclose(torch.jit.load(file)(x), model(x))


def test_llama_compiles_whole() -> None:
    model = adapted(llama(1), torch.float32, targets="all-linear")
    model(TOKENS)  # plans and kernels are there before
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(step(model, TOKENS, lambda i: compiled(input_ids=i, use_cache=False)), step(model, TOKENS), 1e-5)


# Siblings.


class Parent(nn.Module):
    """Calls q, k and v as `between` says."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(32, 8)
        self.between: Callable[[Tensor], Any] = lambda x: None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.between(x)
        k = self.k(x)
        return q * k + self.v(x)


def test_siblings_are_computed_together(path: str) -> None:
    model = adapted(Parent())
    with Served() as served:
        model(inputs(5, 32))
    assert served.shares == [3]
    matches(model, inputs(5, 32), taken=1)


@pytest.mark.parametrize("kind", ["pre", "post", "changing", "in_place"])
def test_hooks_on_a_sibling_run_and_may_change_what_it_sees(kind: str, path: str) -> None:
    model, calls = adapted(Parent()), []

    def pre(module: Any, args: Any) -> Any:
        calls.append(1)
        if kind == "changing":
            return (args[0] * 2,)
        return args[0].mul_(2) and None if False else (args[0].mul_(2), None)[1] if kind == "in_place" else None

    def post(module: Any, args: Any, y: Tensor) -> Tensor:
        calls.append(1)
        return y + 1

    k = model.get_base_model().k
    k.register_forward_hook(post) if kind == "post" else k.register_forward_pre_hook(pre)
    x = inputs(5, 32, grad=False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            calls.clear()
            with modes.reference_only():
                expected = model(x.clone())
            assert torch.allclose(model(x.clone()), expected) and len(calls) == 2
    if kind != "in_place":
        matches(model, inputs(5, 32))
    nothing_waits(model)


def nothing_waits(model: nn.Module) -> None:
    """No sibling holds an input or an output for another."""
    for module in model.modules():
        state = module.__dict__.get("_veneer")
        if state is not None and state.group is not None:
            for ends in state.group.made.values():
                for end in ends.values():
                    assert end.together.pending.x is None


def test_layers_called_from_elsewhere_compute_themselves(path: str) -> None:
    """What a sibling computed before may be of other parameters, of training, or of a graph that is gone."""
    model, x = adapted(Parent(), lora_dropout=0.5), inputs(5, 32, grad=False)
    base = model.get_base_model()

    def same(layer: nn.Module) -> None:
        with modes.reference_only():
            expected = layer(x)
        assert deviation(layer(x), expected) <= 1e-10

    for layer in (base.k, base.q, base.v, base.q, base.q):
        same(layer)
    base.q(x).sum().backward()
    base.k(x).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(2)
    same(base.v)
    model.train()
    base.q(x)
    model.eval()
    same(base.k)
    with torch.autocast("cpu", torch.bfloat16):
        adapted(Parent(), torch.float32).get_base_model().q(x.float())
    nothing_waits(model)
    assert base.q.forward(x).shape == (5, 8)


def test_an_input_that_changes_between_siblings(path: str) -> None:
    model = adapted(Parent())
    base, x = model.get_base_model(), inputs(5, 32, grad=False)
    base.between = lambda x: x.add_(1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for make in (x.clone, lambda: torch.ones(5, 32, dtype=torch.float64)):
                with modes.reference_only():
                    expected = model(make())
                assert torch.allclose(model(make()), expected)
    nothing_waits(model)


def test_an_exception_between_siblings(path: str) -> None:
    model, x = adapted(Parent()), inputs(5, 32)
    base = model.get_base_model()

    def fail(x: Tensor) -> None:
        raise KeyError

    matches(model, x)
    base.between = fail
    with pytest.raises(KeyError):
        model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    base.between = lambda x: None
    matches(model, x)
    nothing_waits(model)


def test_siblings_between_which_settings_change(path: str) -> None:
    model, x = adapted(Parent()), inputs(5, 32)
    base = model.get_base_model()
    base.between = lambda x: torch.set_grad_enabled(False)
    with Served() as served, torch.enable_grad():
        y = model(x)
    assert not y.requires_grad and served.shares == [3, 2]
    with modes.reference_only(), torch.enable_grad():
        assert torch.allclose(model(x), y)
    base.between = lambda x: base(x) if x.shape[0] > 99 else setattr(base, "between", lambda x: None) or base(x)
    matches(model, x)  # the parent within the parent, on the same input


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Attention(), Parent()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.a(x) + F.pad(self.b(x), (0, 24))


def test_one_input_for_several_layers_and_one_layer_twice(path: str) -> None:
    model = adapted(Twice())
    matches(model, inputs(5, 32))
    nothing_waits(model)


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_a_batch_stays(train: bool, path: str) -> None:
    model = adapted(nn.Sequential(Attention(), Gated(), Parent()), lora_dropout=0.1).train(train)
    alive = []

    def note(module: Any, args: Any, y: Tensor) -> None:
        alive.extend([weakref.ref(args[0]), weakref.ref(y)])

    model.get_base_model()[1].register_forward_hook(note)
    for _ in range(2):
        x = inputs(5, 32)
        y = model(x)
        y.sum().backward()
        alive += [weakref.ref(x), weakref.ref(y)]
        del x, y
        gc.collect()
        assert not [a for a in alive if a() is not None]
    nothing_waits(model)


def test_copies_right_after_a_forward(path: str) -> None:
    model, x = adapted(nn.Sequential(Attention(), Gated())), inputs(5, 32)
    expected = step(model, x)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    for other in (copied, pickled):
        with Served() as served:
            close(step(other, x), expected, 1e-12)
        assert served.calls == 3
        other.get_base_model()[0].between = None
        nothing_waits(other)


# Gated networks: whoever wants to see the layers inside sees them.


@pytest.mark.parametrize("child", ["gate", "act", "up", "down"])
def test_hooks_inside_a_gated_network_see_their_calls(child: str, path: str) -> None:
    model, x, calls = adapted(Gated()), inputs(5, 32), []
    expected = step(model, x)
    part = getattr(model.get_base_model(), child)
    handles = [part.register_forward_hook(lambda m, a, y: calls.append(y.shape))]
    handles.append(part.register_full_backward_hook(lambda *_: calls.append("back")))
    close(step(model, x), expected, 1e-10)
    assert len(calls) == 2
    for handle in handles:
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: calls.append(m))
    try:
        close(step(model, x), expected, 1e-10)
        assert part in calls
    finally:
        handle.remove()
    matches(model, x, taken=1)


def test_a_child_that_is_replaced(path: str) -> None:
    model, x = adapted(Gated()), inputs(5, 32)
    base = model.get_base_model()
    matches(model, x, taken=1)
    for name in ("gate", "down", "act"):
        other = nn.Linear(*getattr(base, name).weight.T.shape, dtype=torch.float64) if name != "act" else nn.Tanh()
        setattr(base, name, other.requires_grad_(False))
        with torch.no_grad():
            found = model(x)
        assert torch.allclose(found, base.down(base.act(base.gate(x)) * base.up(x)))
        matches(model, x)


def test_a_parametrized_or_pruned_layer(path: str) -> None:
    from torch.nn.utils import parametrize, prune

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    for base in BASES.values():
        model, x = adapted(base(bias=True)), inputs(5, 32)
        first = next(m for m in model.get_base_model().modules() if isinstance(m, nn.Linear))
        before = step(model, x)["y"]
        parametrize.register_parametrization(first, "weight", Double())
        with modes.reference_only():
            expected = step(model, x)
        close(step(model, x), expected, 1e-10)
        assert not torch.allclose(before, expected["y"])
        model = adapted(base(bias=True))
        first = next(m for m in model.get_base_model().modules() if isinstance(m, nn.Linear))
        prune.custom_from_mask(first, "weight", torch.arange(first.weight.numel()).view(first.weight.shape) % 2)
        with modes.reference_only():
            expected = step(model, x)
        close(step(model, x), expected, 1e-10)


def test_a_forward_put_on_the_instance_runs(path: str) -> None:
    x = inputs(5, 32)

    def own(self: Any, x: Tensor) -> Tensor:
        return self.down(self.gate(x)) - 1

    for make in (lambda b: types.MethodType(own, b), lambda b: functools.partial(own, b)):
        holder = nn.Sequential(Gated())
        holder[0].forward = make(holder[0])
        model = adapted(holder)
        matches(model, x)
        gate = holder[0].gate
        with torch.no_grad():
            assert torch.allclose(model(x), holder[0].down(gate(x)) - 1)
    model = adapted(Gated())
    base = model.get_base_model()
    base.forward = types.MethodType(own, base)  # after attaching
    with torch.no_grad():
        assert torch.allclose(model(x), base.down(base.gate(x)) - 1)


def test_a_forward_replaced_on_the_class_runs(path: str) -> None:
    class Mine(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x))

    first, x = adapted(Mine()), inputs(5, 32)
    matches(first, x, taken=1)
    before = Mine.forward
    Mine.forward = lambda self, x: self.down(self.up(x))
    for model in (first, adapted(Mine())):
        base = model.get_base_model()
        with torch.no_grad():
            assert torch.allclose(model(x), base.down(base.up(x)))
    Mine.forward = before
    matches(adapted(Mine()), x, taken=1)


def test_an_activation_that_is_no_module(path: str) -> None:
    class Mine(Gated):
        def __init__(self) -> None:
            super().__init__()
            del self.act
            self.act = F.silu

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x))

    matches(adapted(Mine()), inputs(5, 32), taken=2)


def test_cpu_offload_of_a_gated_network(path: str) -> None:
    from accelerate import cpu_offload

    model = adapted(nn.Sequential(Attention(), Gated()), torch.float32)
    x = inputs(5, 32, dtype=torch.float32, grad=False)
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
        assert deviation(model(x), expected) <= 1e-5


# Single tokens in `generate`, for which the low-rank parts are made ready once.

GENERATE: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True},
                                       "pissa": {"init_lora_weights": "pissa"}, "some": {"targets": ["q_proj", "up_proj"]}}  # fmt: skip


def logits(model: Any, **options: Any) -> Tensor:
    """Of every token that is generated, (tokens, vocabulary)."""
    out = model.generate(input_ids=TOKENS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0,
                         output_logits=True, return_dict_in_generate=True, **options)  # fmt: skip
    return torch.cat(out.logits)


@pytest.mark.parametrize("config", GENERATE)
def test_generate(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    all_of = decode.Tokens.all
    monkeypatch.setattr(decode.Tokens, "all", lambda *args: (taken.append(args), all_of(*args))[1])
    model = adapted(llama(attention_bias=True, mlp_bias=True), **{"targets": "all-linear", **GENERATE[config]})
    for _ in range(2):
        with modes.reference_only():
            expected = logits(model)
        taken.clear()
        close({"y": logits(model)}, {"y": expected}, 1e-9)
        assert bool(taken) == (config != "dora")
        scramble(model, 9)  # nothing is kept from one call to the next
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected)


def test_one_token_in_another_dtype_under_autocast() -> None:
    """A layer in half precision whose input is not: autocast converts, which products into given room do not."""
    model = adapted(One()).to(torch.bfloat16).eval()
    x = inputs(1, 32, grad=False).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.runtime.router.hold(decoding={}):
        got = model(x)
        with modes.reference_only():
            torch.testing.assert_close(got, model(x), atol=2e-2, rtol=2e-2)


def test_generate_with_adapters_that_change_on_the_way() -> None:
    model = adapted(llama(), targets="all-linear")
    model.add_adapter("b", veneer.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    def switched() -> Tensor:
        model.set_adapter("default")

        def switch(ids: Tensor, scores: Tensor) -> Tensor:
            model.set_adapter(["default", "b"] if ids.shape[1] % 2 else "b")
            return scores

        return logits(model, logits_processor=[switch])

    with modes.reference_only():
        expected = switched()
    close({"y": switched()}, {"y": expected}, 1e-9)


# More than one process.


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "sharded_step.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]  # fmt: skip
    try:
        for rank in ranks:
            out, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0 and out.count("is right") == 3, out[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


# Reading the source.


def classes() -> Iterator[tuple[type[nn.Module], Any, Any]]:
    """Classes, with their siblings and whether they are a gated network."""

    def loud(f: Any) -> Any:
        @functools.wraps(f)
        def twice(*args: Any) -> Any:
            return f(*args) * 2

        return twice

    def hidden(f: Any) -> Any:
        return lambda *args: f(*args) * 2

    class Reassigned(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            q = self.q(x)
            x = x * 2
            return q + self.k(x) + self.v(x)

    class Augmented(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            q = self.q(x)
            x += 1
            return q + self.k(x)

    class Branches(nn.Module):
        def forward(self, x, both=True):  # type: ignore[no-untyped-def]
            q = self.q(x)
            if both:
                return q + self.k(x)
            else:
                return q + self.v(x)

    class Lazily(nn.Module):
        def forward(self, x, both=True):  # type: ignore[no-untyped-def]
            return self.q(x) + (self.k(x) if both else 0) + sum(self.v(x) for _ in range(2))

    class Two(nn.Module):
        def forward(self, x, y):  # type: ignore[no-untyped-def]
            return self.q(x) + self.k(y) + self.v(y)

    class Repeated(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.q(x) + self.q(x) + self.k(x)

    class Named(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            """A docstring."""
            e = self.act(self.gate(x))
            g = self.up(x)
            h = g * e
            y = self.down(h)
            return y

    class Swapped(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down(self.up(x) * self.act(self.gate(x)))

    class OfUp(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down(self.gate(x) * self.act(self.up(x)))

    class Added(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down(self.act(self.gate(x)) + self.up(x))

    class Scaled(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down(self.act(self.gate(x)) * self.up(x)) * 2

    class Prepared(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            x = self.norm(x)
            return self.down(self.act(self.gate(x)) * self.up(x))

    class SideEffect(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            seen = x.mul_(2)  # noqa: F841
            return self.down(self.act(self.gate(x)) * self.up(x))

    class Overwritten(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            y = self.other(x)
            y = self.act(self.gate(x))
            return self.down(y * self.up(x))

    class Squared(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            h = self.gate(x)
            return self.down(self.act(h) * h)

    class Printing(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            print()
            return self.down(self.act(self.gate(x)) * self.up(x))

    class Conditional(nn.Module):
        def forward(self, x):  # type: ignore[no-untyped-def]
            if self.training:
                return x
            return self.down(self.act(self.gate(x)) * self.up(x))

    class More(nn.Module):
        def forward(self, x, scale):  # type: ignore[no-untyped-def]
            return self.down(self.act(self.gate(x)) * self.up(x))

    class Decorated(nn.Module):
        @loud
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down(self.act(self.gate(x)) * self.up(x))

    class Hidden(nn.Module):
        @hidden
        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down(self.act(self.gate(x)) * self.up(x))

    class Unread(nn.Module):
        exec("def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x))")

    class Lambda(nn.Module):
        forward = lambda self, x: self.down(self.act(self.gate(x)) * self.up(x))  # noqa: E731

    class Inherited(Named):
        pass

    class Super(Named):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return super().forward(x) * 2

    pair = {"gate", "up"}
    yield from [
        (Reassigned, [{"k", "v"}], False), (Augmented, [], False), (Branches, [], False), (Lazily, [], False),
        (Two, [{"k", "v"}], False), (Repeated, [], False), (Named, [pair], True), (Swapped, [pair], True),
        (OfUp, [pair], True), (Added, [pair], False), (Scaled, [pair], False), (Prepared, [pair], False),
        (SideEffect, [pair], False), (Overwritten, [{"other", *pair}], False), (Squared, [], False),
        (Printing, [pair], False), (Conditional, [pair], False), (More, [pair], False), (Decorated, [pair], False),
        (Hidden, [], False), (Unread, [], False), (Lambda, [], False), (Inherited, [pair], True), (Super, [], False),
    ]  # fmt: skip


@pytest.mark.parametrize(("base", "groups", "network"), classes(), ids=lambda v: getattr(v, "__name__", ""))
def test_structure(base: type[nn.Module], groups: Any, network: bool) -> None:
    assert [set(g) for g in structure.find_siblings(base)] == groups
    found = structure.decode_gated(base)
    assert (found is not None) == network
    if found is not None:
        gate, up = ("up", "gate") if base.__name__ == "OfUp" else ("gate", "up")  # the activation is of the other
        assert found == (gate, "act", up, "down")


def test_structure_of_transformers() -> None:
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense
    from transformers.models.whisper.modeling_whisper import WhisperAttention

    assert structure.find_siblings(LlamaAttention) == (("q_proj", "k_proj", "v_proj"),)
    assert structure.decode_gated(LlamaMLP) == ("gate_proj", "act_fn", "up_proj", "down_proj")
    assert set(structure.find_siblings(BertSelfAttention)[0]) >= {"query", "key", "value"}
    for other in (GPT2MLP, T5DenseGatedActDense, MixtralExperts):  # dropout between, or no such thing
        assert structure.decode_gated(other) is None
    assert ("q_proj", "k_proj") not in structure.find_siblings(WhisperAttention)


def tiny(family: str) -> nn.Module:
    from transformers import AutoModel, BertConfig, LlamaConfig, T5Config

    torch.manual_seed(0)
    heads = {
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 50,
    }
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    configs = {"llama": (LlamaConfig, heads), "bert": (BertConfig, heads), "t5": (T5Config, t5)}
    kind, sizes = configs[family]
    return AutoModel.from_config(kind(**sizes))


@pytest.mark.parametrize(
    ("family", "targets", "sizes"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], {3: 2, 1: 2}),
        ("llama", ["gate_proj", "up_proj"], {2: 2}),
        ("bert", ["query", "key", "value"], {3: 2}),
        # T5's attention, of either kind, names the input of k and v apart from that of q.
        ("t5", ["q", "k", "v"], {2: 6, 1: 6}),
    ],
)
def test_siblings_share_their_products(
    family: str, targets: list[str], sizes: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that their parent calls on one input run as one kernel; if they stop to, nothing but time tells."""
    from collections import Counter

    from veneer.kernels import linear

    model = veneer.get_peft_model(tiny(family), veneer.LoraConfig(r=2, target_modules=targets)).eval()
    ids = torch.randint(3, 40, (2, 7))
    seen: list[int] = []
    run = linear.run

    def counted(x: Tensor, shares: Any) -> Any:
        seen.append(len(shares))
        return run(x, shares)

    monkeypatch.setattr(linear, "run", counted)
    model(input_ids=ids, **({"decoder_input_ids": ids} if family == "t5" else {}))
    assert Counter(seen) == sizes
