"""No method holds a matrix the size of the weight where its structure allows better; and what it does instead is exact."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import veneer
from small import deviation
from table import METHODS, NAME, Model
from veneer.algebra import cached, low_rank, operators
from veneer.algebra.block_diagonal import BlockDiagonal
from veneer.algebra.hadamard import Hadamard
from veneer.algebra.low_rank import Factored
from veneer.algebra.sums import Sum

IN, OUT, TOKENS = 96, 160, 4

FULL = {
    "ln_tuning": "on a linear layer it trains a copy of the weight, of which it takes the difference",
    "modules_to_save": "a copy of the layer is trained, so the copy has a gradient of its size",
}


def model_for(config: Any, layer: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    base = Model(nn.Linear(IN, OUT) if layer is None else layer)
    base.other = nn.Linear(2, 2)
    model = veneer.get_peft_model(base.to(dtype), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype))
    return model.train()


class Sizes(TorchDispatchMode):
    """Operations that return a tensor of half the weight's size or more in memory that is not among `known`."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.found = known, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(t, Tensor) and large(t, self.known):
                self.found.append((str(func), tuple(t.shape)))
        return made


def large(t: Tensor, known: set[int]) -> bool:
    return t.numel() >= IN * OUT // 2 and t.untyped_storage().data_ptr() not in known


def memory(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def watched(model: nn.Module, x: Tensor) -> tuple[list[Any], list[Any]]:
    """What a forward and backward make and what they save, of the weight's size."""
    known, saved = memory(model), []

    def pack(t: Tensor) -> Tensor:
        if large(t, known):
            saved.append(tuple(t.shape))
        return t

    with Sizes(known) as sizes:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        y.square().sum().backward()
    return sizes.found, saved


def named(config: Callable[..., Any], name: str) -> Any:
    return config(target_modules=["other"] if name == "modules_to_save" else [NAME])


ON_LINEAR = [m for m, row in METHODS.items() if "not_lookup" not in row.not_for]
EXTRA = {
    "loha_high_rank": lambda **names: veneer.LoHaConfig(r=10, **names),  # rank 100 is above the weight's
    "loha_dropout": lambda **names: veneer.LoHaConfig(r=3, rank_dropout=0.2, module_dropout=0.1, **names),
    "loha_high_rank_dropout": lambda **names: veneer.LoHaConfig(r=10, rank_dropout=0.2, **names),
    "dora_pissa": lambda **names: veneer.LoraConfig(r=4, use_dora=True, init_lora_weights="pissa", **names),
    "dora_dropout": lambda **names: veneer.LoraConfig(r=4, use_dora=True, lora_dropout=0.1, **names),
    "oft_dropout": lambda **names: veneer.OFTConfig(oft_block_size=4, module_dropout=0.3, **names),
    "oft_shared_dropout": lambda **names: veneer.OFTConfig(
        oft_block_size=4, module_dropout=0.3, block_share=True, **names
    ),
}
CASES = {**{m: METHODS[m].make for m in ON_LINEAR}, **EXTRA}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_weights_size_is_made_or_saved(name: str, dtype: torch.dtype) -> None:
    model = model_for(named(CASES[name], name), dtype=dtype)
    x = torch.randn(1, TOKENS, IN, dtype=dtype, requires_grad=True)
    made, saved = watched(model, x)
    if name in FULL:
        assert made, f"{name} can leave the list of what is unavoidable: {FULL[name]}"
    else:
        assert not made and not saved


@pytest.mark.parametrize("layer", ["gpt2", "grouped"])
def test_the_norm_of_dora_makes_no_copy_in_other_layouts(layer: str) -> None:
    made: nn.Module = Conv1D(OUT, IN) if layer == "gpt2" else nn.Conv1d(IN, OUT, 2, groups=4)
    for dtype in (torch.float32, torch.bfloat16):
        config = veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME])
        model = model_for(config, copy.deepcopy(made), dtype)
        x = torch.randn(TOKENS, IN, *([3] if layer == "grouped" else []), dtype=dtype)
        assert watched(model, x) == ([], [])


# DoRA's norm against its formula.

LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), {}),
    "pissa": (lambda: nn.Linear(IN, OUT), {"init_lora_weights": "pissa"}),
    "gpt2": (lambda: Conv1D(OUT, IN), {}),
    "conv": (lambda: nn.Conv2d(24, 40, 3), {}),
    "grouped": (lambda: nn.Conv2d(24, 40, 3, groups=4), {}),
    "depthwise": (lambda: nn.Conv1d(24, 24, 3, groups=24), {"r": 24}),
    "embedding": (lambda: nn.Embedding(300, 40), {}),
    "attention": (lambda: nn.MultiheadAttention(32, 2), {}),
}
PRECISIONS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}


def site_of(model: Any, part: str = "") -> Any:
    layer = model.get_base_model().layer
    state = layer.__dict__["_veneer"]
    return state.weights.sites[0]


def norms(model: Any) -> tuple[Tensor, Tensor]:
    """The norm, and what it is by its formula in float64."""
    site = site_of(model)
    method, p = site.adapter("default")
    with torch.no_grad():
        full = site.kind.delta_matrix(site, wide(method, p, site), site.weight().double()) + site.weight().double()
        return method.row_norm(p, site), full.norm(dim=1)


def wide(method: Any, p: dict[str, Tensor], site: Any) -> Any:
    return method.delta({k: t.double() for k, t in p.items()}, site)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_norm_is_exact(layer: str, dtype: torch.dtype) -> None:
    make, options = LAYERS[layer]
    model = model_for(veneer.LoraConfig(**{"r": 8, "use_dora": True, "target_modules": [NAME], **options}), make())
    got, expected = norms(model.to(dtype))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((got - expected).abs() / expected).max() <= PRECISIONS[dtype]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norms(model)[0], got), "autocast must not reach the norm"


def test_the_norm_of_long_rows_is_exact() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME]), Conv1D(8, 20000))
    got, expected = norms(model)
    assert ((got - expected).abs() / expected).max() <= 1e-6


def test_a_row_that_the_adapter_cancels_has_a_norm() -> None:
    model = model_for(veneer.LoraConfig(r=1, lora_alpha=1, use_dora=True, target_modules=[NAME]))
    p = site_of(model).adapter("default")[1]
    with torch.no_grad():
        p["A"].copy_(site_of(model).weight()[3:4])
        p["B"].zero_()[3] = -1
    got, _ = norms(model)
    assert torch.isfinite(got).all() and got[3] <= 1e-3


def test_gradients_of_dora_are_those_of_its_formula() -> None:
    model = model_for(veneer.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=[NAME])).double()
    layer, x = model.get_base_model().layer, torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    p = site_of(model).adapter("default")[1]
    wanted = [x, p["A"], p["B"], p["m"]]
    got = torch.autograd.grad(layer(x).square().sum(), wanted)
    W = layer.weight + 1.5 * p["B"] @ p["A"]
    y = x @ W.T * (p["m"] / W.detach().norm(dim=1)) + layer.bias
    for a, b in zip(got, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# What is kept of the weight is dropped when the weight changes.


def reload(layer: nn.Module) -> None:
    state = {k: v.clone() * 2 for k, v in layer.state_dict().items() if ":" not in k}
    layer.load_state_dict(state, strict=False)


def assign(layer: nn.Module) -> None:
    state = {k: v.clone() * 2 for k, v in layer.state_dict().items() if ":" not in k}
    layer.load_state_dict(state, strict=False, assign=True)


def in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight[2:5].mul_(2)


def swap(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data * 2


def swap_twice(layer: nn.Module) -> None:
    for _ in range(2):  # the second may get the memory of the first
        layer.weight.data = layer.weight.data * 2


def uncounted(layer: nn.Module) -> None:
    layer.weight.data.mul_(2)


def another(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


def same_memory(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    with torch.no_grad():
        layer.weight[1, 1] += 1


def transposed(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data.flip(0).T.contiguous().T


def device(layer: nn.Module) -> None:
    layer._apply(lambda t: t.clone() * 2)


def precision(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data.bfloat16()


CHANGES = (reload, assign, in_place, swap, swap_twice, uncounted, another, same_memory, transposed, device, precision)


@pytest.mark.parametrize("looks", [True, False])  # False: as on an accelerator, where no elements are compared
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_is_noticed(
    change: Callable[[nn.Module], None], looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not looks:
        if change is uncounted:
            pytest.skip("nothing shows such a write there")
        monkeypatch.setattr(cached, "first_markable", lambda t: [])
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME]))
    norms(model)
    held = site_of(model).squares.held
    assert held is not None
    norms(model)
    assert site_of(model).squares.held is held, "nothing changed, so nothing is computed"
    before = site_of(model).weight().clone()
    change(model.get_base_model().layer)
    got, expected = norms(model)
    assert ((got - expected).abs() / expected).max() <= 1e-6
    assert site_of(model).squares.held is not held
    assert not torch.equal(before, site_of(model).weight()) or change is same_memory


def test_a_trained_base_is_noticed() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME]))
    weight = model.get_base_model().layer.weight.requires_grad_()
    for options in ({"foreach": True}, {"fused": True}):
        optimizer = torch.optim.AdamW([weight], lr=0.1, **options)
        model(torch.randn(TOKENS, IN)).square().sum().backward()
        optimizer.step()
        got, expected = norms(model)
        assert ((got - expected).abs() / expected).max() <= 1e-6


def test_the_norm_is_that_of_the_base_while_merged() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME])).eval()
    x = torch.randn(TOKENS, IN)
    before, norm = model(x), norms(model)[0]
    model.merge_adapter()
    assert torch.equal(norms(model)[0], norm)
    model.unmerge_adapter()
    assert torch.equal(norms(model)[0], norm) and torch.equal(model(x), before)
    unloaded = model.merge_and_unload()
    assert deviation(unloaded(x), before) <= 1e-5


def test_copies_and_pickles_keep_nothing() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME]))
    norms(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert site_of(twin).squares.held is None
        reload(twin.get_base_model().layer)
        for one in (twin, model):
            got, expected = norms(one)
            assert ((got - expected).abs() / expected).max() <= 1e-6


def test_inference_and_training_share_it() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME]))
    with torch.inference_mode():
        model(torch.randn(TOKENS, IN))
    model(torch.randn(TOKENS, IN)).square().sum().backward()  # nothing made in inference mode is saved
    assert model.get_base_model().layer._parameters["lora_A:default"].grad is not None


def test_threads_share_it() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME])).eval()
    x, wrong = torch.randn(TOKENS, IN), []
    with torch.no_grad():
        expected = model(x)

    def work() -> None:
        for _ in range(50):
            site_of(model).squares.held = None
            with torch.no_grad():
                if not torch.equal(model(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_nothing_is_kept_in_a_compiled_graph() -> None:
    model = model_for(veneer.LoraConfig(r=4, use_dora=True, target_modules=[NAME])).eval()
    x = torch.randn(TOKENS, IN)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert deviation(compiled(x), model(x)) <= 1e-6
        model.get_base_model().layer.weight.data.mul_(2)
        assert deviation(compiled(x), model(x)) <= 1e-6


# Operators against their dense matrices.


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def hadamard(r: int, dtype: torch.dtype) -> tuple[Hadamard, list[Tensor]]:
    p = [draw(OUT, r, dtype=dtype), draw(r, IN, dtype=dtype), draw(OUT, r, dtype=dtype, seed=5),
         draw(r, IN, dtype=dtype, seed=6)]  # fmt: skip
    return Hadamard(*p, 0.7), p


def vera(dtype: torch.dtype) -> tuple[Factored, list[Tensor]]:
    B, A = draw(OUT, 5, dtype=dtype).detach(), draw(5, IN, dtype=dtype).detach()
    p = [draw(5, dtype=dtype), draw(OUT, dtype=dtype)]
    return Factored(B, A, 0.7, inner=p[0], outer=p[1]), p


def blocks(dtype: torch.dtype, count: int | None = None) -> tuple[BlockDiagonal, list[Tensor]]:
    p = [draw(1 if count else IN // 8, 8, 8, dtype=dtype)]
    return BlockDiagonal(p[0], count=count), p


OPERATORS: dict[str, Callable[[torch.dtype], tuple[Any, list[Tensor]]]] = {
    "hadamard": lambda dtype: hadamard(3, dtype),
    "hadamard_in_pieces": lambda dtype: hadamard(10, dtype),
    "vera": vera,
    "blocks": blocks,
    "shared_block": lambda dtype: blocks(dtype, IN // 8),
}
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows", [(2,), (3, 7)], ids=["few", "many"])  # VeRA folds its vectors for many
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_their_matrices(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    op, p = OPERATORS[name](dtype)
    reference, q = OPERATORS[name](torch.float64)
    with torch.no_grad():
        for a, b in zip(p, q, strict=True):
            b.copy_(a)
    for key in ("B", "A"):  # VeRA's frozen factors
        if key in vars(reference):
            setattr(reference, key, getattr(op, key).double())
    x = draw(*rows, IN, dtype=dtype, seed=9)
    z = x.detach().double().requires_grad_()
    y, expected = op.apply(x), z @ reference.dense().T
    assert y.dtype == dtype and y.shape == expected.shape
    g = draw(*y.shape, dtype=dtype, seed=2).detach()
    got = (y, *torch.autograd.grad(y, [x, *p], g))
    for a, b in zip(got, (expected, *torch.autograd.grad(expected, [z, *q], g.double())), strict=True):
        assert (a - b).abs().max() / b.abs().max() <= CLOSE[dtype]


@pytest.mark.parametrize("name", ["hadamard", "hadamard_in_pieces"])
def test_the_backward_has_a_derivative(name: str) -> None:
    r = 1 if name == "hadamard" else 3
    p = [draw(*s, dtype=torch.float64, seed=i) for i, s in enumerate([(8, r), (r, 6), (8, r), (r, 6)])]
    x = draw(3, 6, dtype=torch.float64)

    def f(x: Tensor, *p: Tensor) -> Tensor:
        return Hadamard(*p, 0.5).apply(x)

    assert Hadamard(*p).thin is (name == "hadamard")
    assert torch.autograd.gradcheck(f, (x, *p)) and torch.autograd.gradgradcheck(f, (x, *p))


def test_pieces_under_autocast() -> None:
    op, _ = hadamard(10, torch.float32)
    x = draw(TOKENS, IN, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op.apply(x)
    assert y.dtype == torch.bfloat16
    expected = x @ op.dense().T
    assert (y - expected).abs().max() / expected.abs().max() <= 2e-2
    y.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_pieces_compile_with_their_backward() -> None:
    op, p = hadamard(10, torch.float32)
    x = draw(TOKENS, IN, dtype=torch.float32)
    torch._dynamo.reset()

    def f(x: Tensor, *p: Tensor) -> Tensor:
        return Hadamard(*p, 0.7).apply(x)

    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, *p).square().sum(), [x, *p])
    for a, b in zip(got, torch.autograd.grad((x @ op.dense().T).square().sum(), [x, *p]), strict=True):
        assert (a - b).abs().max() / b.abs().max() <= 2e-5


def test_dropped_rows_and_skipped_steps() -> None:
    for r in (3, 10):
        op = hadamard(r, torch.float64)[0]
        op.row_dropout = 0.5
        torch.manual_seed(3)
        sampled = op.sample().dense()
        torch.manual_seed(3)
        keep = (torch.rand(OUT, 1) > 0.5).double()
        torch.testing.assert_close(sampled, op.dense() * (keep / keep.mean()))
        op.row_dropout, op.skip = 0.0, 0.5
        seen = {bool(op.sample().dense().any()) for _ in range(30)}
        assert seen == {True, False}


def test_a_lookup_is_columns_of_the_matrix() -> None:
    op, _ = hadamard(3, torch.float64)
    ids = torch.tensor([[0, 5], [5, IN - 1]])
    torch.testing.assert_close(op.lookup(ids), op.dense().T[ids])


def test_an_embedding_forms_no_delta() -> None:
    model = model_for(veneer.LoHaConfig(r=3, target_modules=[NAME]), nn.Embedding(IN, OUT, padding_idx=0))
    ids = torch.tensor([[0, 4, 9]])
    made, saved = watched(model, ids)
    assert not made and not saved
    layer, p = model.get_base_model().layer, site_of(model).adapter("default")[1]
    got = torch.autograd.grad(layer(ids).square().sum(), list(p.values()))
    op = site_of(model).entries["default"].method.delta(p, site_of(model))
    table = nn.functional.embedding(ids, layer.weight) + nn.functional.embedding(ids, op.dense().T, padding_idx=0)
    for a, b in zip(got, torch.autograd.grad(table.square().sum(), list(p.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the padding's row is not trained


@pytest.mark.parametrize("weights", ["rows", "columns", "groups"])
def test_half_precision_weights_are_read_in_pieces(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "PIECE", 100)
    n, out, into = (4, 10, 6) if weights == "groups" else (1, 30, 50)
    W = (
        torch.randn(n, into, out).bfloat16().transpose(1, 2)
        if weights == "columns"
        else torch.randn(n, out, into).bfloat16()
    )
    A = torch.randn(n, 3, into)
    torch.testing.assert_close(low_rank.rows_times(W, A), W.float() @ A.transpose(1, 2))


def test_row_products_and_squares_of_sums() -> None:
    W = draw(OUT, IN, dtype=torch.float64).detach()
    a, b = Factored(draw(OUT, 3, dtype=torch.float64), draw(3, IN, dtype=torch.float64), 2.0), vera(torch.float64)[0]
    for op in (a, b, Sum(a, b), Sum(a, hadamard(3, torch.float64)[0])):
        M = op.dense()
        torch.testing.assert_close(op.row_squares(torch.float64), M.square().sum(1))
        torch.testing.assert_close(op.row_products(W, torch.float64), (W * M).sum(1))


@pytest.mark.parametrize(("rows", "wanted"), [(3, {(3, 5), (3, OUT)}), (64, {(64, 5), (OUT, 5)})])
def test_vera_keeps_what_has_fewest_entries(rows: int, wanted: set[tuple[int, int]]) -> None:
    op, _ = vera(torch.float32)
    known, saved = {t.untyped_storage().data_ptr() for t in (op.A, op.B, op.inner, op.outer)}, {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known and t.ndim == 2:
            saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = op.apply(draw(rows, IN, dtype=torch.float32))  # kept alive, as is what it saved
    assert y.shape == (rows, OUT)
    if rows == 3:  # h and h * inner, and the output before its scales
        assert set(saved.values()) <= {a * b for a, b in wanted}
    else:
        assert sorted(saved.values()) == sorted(a * b for a, b in wanted)
