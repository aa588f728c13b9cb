"""bitsandbytes bases: int8, nf4 and fp4, on a CPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import pickle
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import veneer
from small import bits, scramble
from table import METHODS, NAME, Model
from veneer.algebra import modes
from veneer.backends import backend_of
from veneer.kernels import around, around_gated
from veneer.kernels import linear as linear_kernel

bnb = pytest.importorskip("bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every int8 call that it casts to float16

STORES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
IDS = torch.arange(12).view(2, 6)
WIDE = ["q_proj", "v_proj", "down_proj"]


@functools.cache
def folder() -> str:
    """A small random Llama on disk, which transformers quantizes as it loads."""
    import tempfile

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2))
    where = tempfile.mkdtemp()
    made.save_pretrained(where)
    return where


def llama(store: str | None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    if store is not None:
        if "4bit" in "".join(STORES[store]):
            options = {"bnb_4bit_compute_dtype": dtype, **options}
        options = {"quantization_config": BitsAndBytesConfig(**STORES[store], **options)}
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, device_map="cpu", **options)


def linear(store: str, into: int = 64, out: int = 96, bias: bool = True) -> nn.Module:
    """One quantized layer."""
    if store == "int8":
        made = bnb.nn.Linear8bitLt(into, out, bias=bias, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(
            into, out, bias=bias, compress_statistics="double" in store, quant_type=store.partition("_")[0]
        )
    made.weight.data = torch.randn(out, into) / 8
    return made.to("cpu")


# Every method on every store.

ON_LINEAR = sorted(n for n in METHODS if n not in ("tokens", "ln_tuning", "modules_to_save"))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", ON_LINEAR)
def test_methods(method: str, store: str) -> None:
    torch.manual_seed(0)
    row = METHODS[method]
    base = Model(linear(store)).train()
    x, wanted = torch.randn(2, 3, 64), torch.randn(2, 3, 96).tanh()
    plain = base(x)
    model = veneer.get_peft_model(base, row.make(target_modules=[NAME])).train()
    if row.identity:
        torch.testing.assert_close(model(x), plain, atol=2e-5, rtol=2e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for step in range(20):
        z = x.clone().requires_grad_()
        y = model(z)
        assert y.dtype == x.dtype
        loss = (y - wanted).square().mean()
        loss.backward()
        losses.append(loss.item())
        if not step:
            assert z.grad is not None and z.grad.abs().sum() > 0
            assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    if not row.merges:
        return
    before, was, y = bits(base), type(base.layer.weight), model(x)
    model.merge_adapter()
    assert bits(base) != before and type(base.layer.weight) is was
    merged = model(x)
    # As far from it as rounding to these bits goes, which is not far from what quantizing does.
    assert (merged - y).norm() < {"int8": 0.03}.get(store, 0.3) * y.norm()
    model.unmerge_adapter()
    assert bits(base) == before
    torch.testing.assert_close(model(x), y, atol=0, rtol=0)


@pytest.mark.parametrize("store", STORES)
def test_reads_what_the_layer_evaluates(store: str) -> None:
    torch.manual_seed(0)
    layer = linear(store, bias=False).train()
    backend = backend_of(layer, "weight", "layer")
    for _ in range(2):  # int8 moves its tensors in the first forward
        x = torch.randn(5, 64, requires_grad=True)
        weight = backend.read(layer, "weight")
        torch.testing.assert_close(layer(x), x @ weight.T)
        (dx,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(dx, weight.sum(0).expand(5, 64))
        before = bits(layer)
        token = backend.write(layer, "weight", weight * 1.5)
        again = backend.read(layer, "weight")
        assert (again - weight * 1.5).norm() < (0.02 if store == "int8" else 0.05) * weight.norm()
        torch.testing.assert_close(layer(x), x @ again.T)
        torch.testing.assert_close(backend.before(layer, "weight", token), weight, atol=0, rtol=0)
        backend.restore(layer, "weight", token)
        assert bits(layer) == before


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model(store: str, dtype: torch.dtype, tmp_path: Any) -> None:
    base = llama(store, dtype)
    before = bits(base)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    assert set(model.peft_config["default"].target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    scramble(model)
    assert model.eval()(IDS).logits.dtype == dtype  # a forward in between must not change the weights' format
    out = model.train()(IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert bits(base) == before

    model.save_pretrained(tmp_path / "a")
    for other in (llama(store, dtype), llama(None, dtype)):  # back, and on the plain base
        loaded = veneer.PeftModel.from_pretrained(other, tmp_path / "a").train()
        y = loaded(IDS).logits
        assert (y - out.logits).norm() < (1e-6 if other.config.to_dict().get("quantization_config") else 0.8) * y.norm()
    loaded.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)  # their metadata tells the bases apart

    model.zero_grad(set_to_none=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.train()(IDS).logits, out.logits, atol=0, rtol=0)
    model.unload()
    assert bits(base) == before and type(base.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")


def test_plain_bases_take_adapters_of_quantized_ones(tmp_path: Any) -> None:
    model = veneer.get_peft_model(llama("nf4"), veneer.LoraConfig(r=4, target_modules=WIDE))
    scramble(model)
    model.save_pretrained(tmp_path)
    plain = llama(None)
    with torch.no_grad():  # the plain base with the values that the quantized one evaluates
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                plain.get_submodule(name).weight.copy_(backend_of(module, "weight", name).read(module, "weight"))
    other = veneer.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("store", ["int8", "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_against_peft(store: str, options: dict[str, Any], tmp_path: Any) -> None:
    import peft

    ours = veneer.get_peft_model(llama(store), veneer.LoraConfig(r=4, target_modules=WIDE, **options))
    scramble(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(store), tmp_path, is_trainable=True)
    ys, gradients = [], []
    for model in (ours, theirs):
        out = model.train()(IDS, labels=IDS)
        out.loss.backward()
        ys.append(out.logits)
        named = model.named_parameters()
        gradients.append({re.split(r":default|\.default", n)[0]: p.grad for n, p in named if p.grad is not None})
    assert (ys[0] - ys[1]).norm() <= 1e-4 * ys[1].norm()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, g in gradients[1].items():
        assert (gradients[0][name] - g).norm() <= 1e-4 * g.norm() + 1e-7, name


def test_rows_of_different_adapters() -> None:
    model = veneer.get_peft_model(llama("nf4"), veneer.LoraConfig(r=4, target_modules=WIDE), "a")
    model.add_adapter("b", veneer.IA3Config(target_modules=WIDE, feedforward_modules=["down_proj"]))
    for parameter in model.runtime.parameters("b"):
        parameter.data += 0.2
    scramble(model)
    rows = model(IDS, adapter_names=["a", "b"]).logits
    for i, name in enumerate("ab"):
        model.set_adapter(name)
        torch.testing.assert_close(rows[i], model(IDS).logits[i], atol=1e-5, rtol=1e-5)


# Checkpointing, in any order.


def start(model: Any) -> None:
    """The same values in every model."""
    for parameter in model.runtime.parameters("default"):
        parameter.data.zero_()
    scramble(model)


def step(model: Any) -> list[Tensor]:
    model.train()(IDS, labels=IDS).loss.backward()
    return [p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad]


@functools.cache
def expected(store: str) -> list[Tensor]:
    model = veneer.get_peft_model(llama(store), veneer.LoraConfig(r=4, target_modules=WIDE))
    start(model)
    return step(model)


@pytest.mark.parametrize("store", ["int8", "nf4"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", ["enabled last", "enabled first"])
def test_checkpointing_in_any_order(store: str, order: str, reentrant: bool) -> None:
    how = {"use_reentrant": reentrant}
    base, config = llama(store), veneer.LoraConfig(r=4, target_modules=WIDE)
    if order == "enabled first":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model = veneer.get_peft_model(base, config)
    start(model)
    if order == "enabled last":  # as a Trainer does
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    assert base.model.layers[0].gradient_checkpointing
    for found, wanted in zip(step(model), expected(store), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


# What cannot be done.


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"q_proj.weight.*bitsandbytes 4-bit.*target_modules"):
        veneer.get_peft_model(
            llama("nf4"), veneer.LoraConfig(r=2, target_modules=[], target_parameters=["self_attn.q_proj.weight"])
        )
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"layer: no weight backend reads Linear.weight .*torch.int8.*bitsandbytes int8.*add a"
    ):
        veneer.get_peft_model(Model(layer), veneer.LoraConfig(r=2, target_modules=[NAME]))


def test_merging_where_it_cannot_be_written(monkeypatch: Any) -> None:
    base = llama("nf4")
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules=WIDE))
    scramble(model)
    before = bits(base)
    backend = type(next(iter(model.runtime.sites.values())).backend)
    monkeypatch.setattr(backend, "can_write", lambda self, owner, param: owner is not last)
    last = base.model.layers[1].mlp.down_proj
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.*unmerged.*dense.*Nothing was merged"):
        model.merge_adapter()
    assert bits(base) == before


# Kernels.


@pytest.mark.parametrize("store", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_match_the_operators(store: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    products = []
    monkeypatch.setattr(
        around, "reduce_batch", lambda x, As, of=around.reduce_batch: products.append(len(As)) or of(x, As)
    )
    model = veneer.get_peft_model(llama(store, dtype), veneer.LoraConfig(r=4, target_modules="all-linear"))
    scramble(model)
    step(model)  # the first one may be looked at through hooks, past which siblings do not see each other
    found = []
    for kernels_run in (True, False):
        products.clear()
        model.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if kernels_run else modes.reference_only():
            out = model(IDS, labels=IDS)
            out.loss.backward()
        found.append([out.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
        # query, key and value with one product, gate and up with one.
        assert products == ([3, 1, 2, 1] * 2 if kernels_run else [])
    near = 1e-5 if dtype == torch.float32 else 8e-2  # bfloat16 has 8 bits, and they are rounded in another order
    for mine, wanted in zip(*found, strict=True):
        assert (mine - wanted).norm() <= near * wanted.norm() + 1e-9


@pytest.mark.parametrize("store", ["int8", "nf4"])
def test_kernels_leave_the_rest_to_the_operators(store: str) -> None:
    model = veneer.get_peft_model(Model(linear(store)).train(), veneer.LoraConfig(r=4, target_modules=[NAME]))
    scramble(model)
    x = torch.randn(2, 3, 64)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - y).norm() < 0.05 * y.norm()
    for p in (*x.shape[:2], 1):
        torch.testing.assert_close(model(x[:p]), y[:p])
    with torch.inference_mode():
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("store", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gated_networks_match_the_operators(
    store: str, dtype: torch.dtype, checkpointing: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(linear_kernel, "SMALL", 0)
    calls: list[int] = []
    monkeypatch.setattr(
        around_gated, "shape_output", lambda y, x, of=around_gated.shape_output: calls.append(1) or of(y, x)
    )
    model = veneer.get_peft_model(llama(store, dtype), veneer.LoraConfig(r=4, target_modules="all-linear"))
    scramble(model)
    step(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = []
    for kernels_run in (True, False):
        calls.clear()
        model.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if kernels_run else modes.reference_only():
            out = model(IDS, labels=IDS)
            out.loss.backward()
        found.append([out.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert len(calls) in (
            (2, 3, 4) if kernels_run else (0,)
        )  # checkpoints stop as soon as they have what they kept
    near = 1e-5 if dtype == torch.float32 else 6e-2
    for mine, wanted in zip(*found, strict=True):
        assert (mine - wanted).norm() <= near * wanted.norm() + 1e-9
    with torch.no_grad():  # without gradients the layers run by themselves
        calls.clear()
        assert torch.isfinite(model(IDS).logits).all() and not calls


def test_gated_networks_keep_two_tensors_of_their_width(monkeypatch: Any) -> None:
    monkeypatch.setattr(linear_kernel, "SMALL", 0)
    model = veneer.get_peft_model(llama("nf4"), veneer.LoraConfig(r=4, target_modules="all-linear"))
    scramble(model)
    step(model)
    kept = []
    for kernels_run in (True, False):
        saved: dict[int, Tensor] = {}

        def pack(t: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            if t.shape[-1:] == (96,) and t.numel() == 12 * 96:  # (rows, tokens, width)
                saved[t.data_ptr()] = t
            return t

        with contextlib.nullcontext() if kernels_run else modes.reference_only():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                model(IDS, labels=IDS).loss.backward()
        kept.append(len(saved))
    assert kept == [2 * 2, 4 * 2]
