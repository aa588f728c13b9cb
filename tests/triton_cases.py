"""The Triton kernels against plain PyTorch. Run by test_triton.py in a process of its own, because triton reads
TRITON_INTERPRET when it is imported: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

import veneer
from veneer.algebra.low_rank import Factored
from veneer.algebra.modes import reference_only
from veneer.kernels import dropout, gated, linear
from veneer.kernels import triton as kernels
from veneer.kernels.member import Share

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.bfloat16)
RANKS = (1, 4, 24, 64, 100, 256)
SHAPES = ((1, 64, 32), (5, 1500, 70), (33, 200, 129), (600, 40, 50))  # M, K, N

if INTERPRETED:
    from triton.runtime import interpreter

    def widened(handle: object) -> object:
        """The interpreter keeps bfloat16 as uint16 and would multiply its bit patterns."""
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, triton.language.float32)

    original = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values that bfloat16 has, for the interpreter truncates where hardware rounds."""
    return torch.randn(*shape, device=DEVICE).bfloat16().to(dtype)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix that is no whole tensor: every second column of wider rows."""
    return random(shape[0] + 1, 2 * shape[1] + 3, dtype=dtype)[1:, 1 : 2 * shape[1] : 2]


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, *, loss: float = 1.0) -> None:
    """Within rounding of `dtype`, relative to the largest entry; `loss` counts the roundings on the way."""
    assert found.shape == wanted.shape
    unit = 1e-6 if dtype == torch.float32 else 2**-8
    largest = max(wanted.abs().max().item(), 1e-3) if wanted.numel() else 1.0
    assert torch.isfinite(found).all()
    if found.numel():
        assert (found.double() - wanted.double()).abs().max().item() <= 4 * loss * unit * largest


def philox(seed: int, c0: np.ndarray, c1: np.ndarray) -> list[np.ndarray]:
    """Philox-4x32-10 of Salmon et al. 2011, at counters (c0, c1, 0, 0)."""
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [c0.astype(np.uint64), c1.astype(np.uint64), np.zeros_like(c0, np.uint64), np.zeros_like(c0, np.uint64)]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> half) ^ c[1] ^ key[0], b & low, (a >> half) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return c


def mask_of(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask by its definition, (rows, columns) of 0 and 1."""
    groups = -(-columns // 4)
    c1, c0 = np.meshgrid(np.arange(rows), np.arange(groups), indexing="ij")
    words = np.stack(philox(int(seed), c0, c1), -1).reshape(rows, 4 * groups)[:, :columns]
    signed = words.astype(np.uint32).view(np.int32)
    uniform = np.where(signed < 0, -signed - 1, signed).astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy((uniform >= np.float32(p)).astype(np.float32)).to(DEVICE)


# Plain products.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shrink_then_expand_is_the_operator(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> None:
    (M, K, N), make = shape, (random if rank % 8 else strided)
    x, y = make(M, K, dtype=dtype), make(M, N, dtype=dtype)
    A, B = random(rank, K), random(N, rank)
    before = y.clone()
    h = kernels.shrink_dropped(x, A)
    close(h, F.linear(x.double(), A.to(dtype).double()), dtype)
    assert h.dtype == dtype
    assert kernels.expand_add_(y, h, B, 0.5) is y
    close(y, before.double() + 0.5 * F.linear(h.double(), B.to(dtype).double()), dtype)
    close(y, before + Factored(B, A, 0.5).apply(x), dtype, loss=3)


@pytest.mark.parametrize("rank", [4, 64])
def test_a_stack_of_siblings_is_one_product(rank: int) -> None:
    x, As = random(40, 300), [random(rank, 300) for _ in range(3)]
    h = kernels.shrink_dropped(x, torch.cat(As))
    for one, A in zip(h.split(rank, 1), As, strict=True):
        close(one, x.double() @ A.double().T, torch.float32)
        y = torch.zeros(40, 50, device=DEVICE)
        close(kernels.expand_add_(y, one, A[:, :50].T), one.double() @ A[:, :50].double(), torch.float32)


def test_the_sum_over_columns_is_split_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = kernels.forward_code().shrink_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            seen.append(grid)
            return real[grid]

    monkeypatch.setattr(kernels, "forward_code", lambda: SimpleNamespace(shrink_kernel=Watched()))
    x, A = random(1, 4096 + 40), random(8, 4096 + 40)
    close(kernels.shrink_dropped(x, A), x.double() @ A.double().T, torch.float32)
    assert seen[0][2] > 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 33, 600])
@pytest.mark.parametrize("rank", [4, 100])
def test_outer(M: int, rank: int, dtype: torch.dtype) -> None:
    g, x = strided(M, rank, dtype=dtype), strided(M, 150, dtype=dtype)
    close(kernels.outer_product(g, x, 2.0), 2 * g.double().T @ x.double(), torch.float32, loss=4)


def test_no_rows() -> None:
    x, A, B = random(0, 64), random(8, 64), random(32, 8)
    y = random(0, 32)
    assert kernels.shrink_dropped(x, A).shape == (0, 8)
    assert kernels.expand_add_(y, kernels.shrink_dropped(x, A), B) is y
    assert torch.equal(kernels.outer_product(random(0, 8), x), torch.zeros(8, 64, device=DEVICE))
    routing = kernels.route_rows(torch.zeros(0, dtype=torch.int32, device=DEVICE), 2)
    assert kernels.shrink_dropped(x, A.expand(2, -1, -1), routing=routing).shape == (0, 8)
    assert kernels.gate_forward(x, x).shape == (0, 64)


# Rows of several adapters.

SLOTS = {
    "mixed": lambda M, S: torch.randint(-1, S, (M,)),
    "one": lambda M, S: torch.full((M,), S - 1),
    "base only": lambda M, S: torch.full((M,), -1),
    "a slot without rows": lambda M, S: torch.randint(0, S, (M,)).clamp(min=1),
    "in turn": lambda M, S: torch.arange(M) % S,
}
ROUTED = [(case, torch.float32) for case in SLOTS] + [("mixed", torch.bfloat16)]


def routed_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    rows = [
        y[i] if s < 0 else y[i] + scales[s] * (B[s] @ (A[s] @ x[i])) for i, s in enumerate(slots.tolist())
    ]  # fmt: skip
    return torch.stack(rows)


@pytest.mark.parametrize(("M", "S", "rank"), [(7, 3, 4), (16, 16, 16), (70, 3, 100), (200, 2, 8)])
@pytest.mark.parametrize(("case", "dtype"), ROUTED)
def test_rows_take_their_own_adapter(case: str, M: int, S: int, rank: int, dtype: torch.dtype) -> None:
    slots = SLOTS[case](M, S).to(DEVICE, torch.int32)
    routing = kernels.route_rows(slots, S)
    names = ("x", "A", "B")
    values = (strided(M, 50, dtype=dtype), random(S, rank, 50), random(S, 70, rank))
    scales, base, up = torch.rand(S, device=DEVICE) + 0.5, random(M, 70, dtype=dtype), random(M, 70, dtype=dtype)
    ours = [v.detach().requires_grad_() for v in values]
    theirs = [v.double().requires_grad_() for v in values]
    y = kernels.routed_add_(base.clone(), *ours, scales, routing)
    wanted = routed_reference(base.double(), *theirs, scales.double(), slots)
    close(y, wanted, dtype, loss=3)
    assert torch.equal(y[slots < 0], base[slots < 0])
    y.backward(up)
    if wanted.requires_grad:
        wanted.backward(up.double())
    for name, own, other in zip(names, ours, theirs, strict=True):
        close(own.grad, torch.zeros_like(own) if other.grad is None else other.grad, dtype, loss=4)
        if name != "x":
            unused = [s for s in range(S) if not (slots == s).any()]
            assert not own.grad[unused].any()


def test_every_block_is_rows_of_one_slot_and_every_row_is_in_one() -> None:
    for M, S in ((1, 1), (5, 40), (64, 4), (65, 4), (1000, 3)):
        slots = torch.randint(-1, S, (M,), dtype=torch.int32, device=DEVICE)
        r = kernels.route_rows(slots, S)
        taken = []
        for slot, first in zip(r.slot.tolist(), r.first.tolist(), strict=True):
            if slot >= 0:
                rows = r.order[first : min(first + r.size, int(r.offsets[slot + 1]))].tolist()
                assert rows and all(slots[i] == slot for i in rows)
                taken += rows
        assert sorted(taken) == [i for i in range(M) if slots[i] >= 0]


# Dropout.


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_one_mask_everywhere(p: float) -> None:
    M, K, r = 70, 211, 5
    seed = kernels.draw_seed(DEVICE)
    mask = mask_of(seed, M, K, p)
    x, A, g = random(M, K), random(r, K), random(M, r)
    close(kernels.shrink_dropped(x, A, p=p, seed=seed), (x * mask).double() @ A.double().T / (1 - p), torch.float32)
    close(kernels.outer_product(g, x, p=p, seed=seed), g.double().T @ (x * mask).double() / (1 - p), torch.float32)
    y = random(M, K)
    wanted = y.double() + 0.5 * (g.double() @ A.double()) * mask / (1 - p)
    close(kernels.expand_add_(y, g, A.T, 0.5, p=p, seed=seed), wanted, torch.float32)
    few = kernels.shrink_dropped(x[:3], A, p=p, seed=seed)  # other blocks, the same mask
    close(few, (x * mask)[:3].double() @ A.double().T / (1 - p), torch.float32)


def test_the_mask_has_the_right_distribution() -> None:
    M, K, p = 300, 400, 0.25
    seeds = [kernels.draw_seed(DEVICE) for _ in range(2)]
    ones = (torch.ones(M, 1, device=DEVICE), torch.ones(K, 1, device=DEVICE))
    masks = [kernels.expand_add_(torch.zeros(M, K, device=DEVICE), *ones, 1 - p, p=p, seed=s) for s in seeds]
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        deviation = (p * (1 - p) / (M * K)) ** 0.5
        assert abs(mask.mean().item() - (1 - p)) < 4 * deviation
        for axis, length in ((0, M), (1, K)):
            spread = mask.mean(axis).var().item() / (p * (1 - p) / length)
            assert 0.75 < spread < 1.3  # rows and columns are independent
    assert (masks[0] == masks[1]).float().mean().item() == pytest.approx((1 - p) ** 2 + p**2, abs=0.01)


def test_dropout_follows_torchs_generator() -> None:
    torch.manual_seed(5)
    first = [int(kernels.draw_seed(DEVICE)) for _ in range(2)]
    torch.manual_seed(5)
    assert first == [int(kernels.draw_seed(DEVICE)) for _ in range(2)] and first[0] != first[1]


def test_dropout_with_rows_of_several_adapters() -> None:
    M, K, N, S, p = 50, 60, 40, 3, 0.3
    slots = torch.randint(-1, S, (M,), dtype=torch.int32, device=DEVICE)
    routing, seed = kernels.route_rows(slots, S), kernels.draw_seed(DEVICE)
    x, A, B, scales = random(M, K), random(S, 4, K), random(S, N, 4), torch.ones(S, device=DEVICE)
    h = kernels.shrink_dropped(x, A, p=p, seed=seed, routing=routing)
    y = kernels.expand_add_(torch.zeros(M, N, device=DEVICE), h, B, routing=routing)
    dropped = x * mask_of(seed, M, K, p) / (1 - p)
    close(y, routed_reference(torch.zeros_like(y), dropped, A, B, scales, slots), torch.float32, loss=3)
    assert not h[slots < 0].any()


# Gated MLPs.

PLAIN = {"silu": F.silu, "gelu_tanh": lambda e: F.gelu(e, approximate="tanh")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1025), (17, 300), (4, 2048)])
@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("layout", ["whole", "halves", "strided"])
def test_gate(layout: str, act: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    M, Fw = shape
    if layout == "halves":  # of one product
        e, g = (3 * random(M, 2 * Fw, dtype=dtype)).chunk(2, 1)
    else:
        e, g = ((3 * (strided if layout == "strided" else random)(M, Fw, dtype=dtype)) for _ in range(2))
        e = 3 * e
    dm = random(M, Fw, dtype=dtype)
    wide = [t.double().requires_grad_() for t in (e, g)]
    wanted = PLAIN[act](wide[0]) * wide[1]
    wanted.backward(dm.double())
    close(kernels.gate_forward(e, g, act), wanted, dtype)
    own = dm.clone()
    de, dg, m = kernels.gate_backward_(own, e, g, act)
    assert de is own
    for found, expected in ((de, wide[0].grad), (dg, wide[1].grad), (m, wanted)):
        close(found, expected, dtype)
        assert found.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(kernels.gate_backward_(dm, e, g, act, remake=False), (de, dg)))


def test_large_inputs_of_the_gate_stay_finite() -> None:
    e = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0]], device=DEVICE)
    for act, plain in PLAIN.items():
        wide = e.double().requires_grad_()
        plain(wide).sum().backward()
        de, _, m = kernels.gate_backward_(torch.ones_like(e), e, torch.ones_like(e), act)
        close(de, wide.grad, torch.float32)
        close(m, plain(e.double()), torch.float32)


# What is refused.


def test_errors_name_the_remedy() -> None:
    x, A = random(2, 16), random(4, 16)
    with pytest.raises(ValueError, match="draw_seed"):
        kernels.shrink_dropped(x, A, p=0.1)
    with pytest.raises(ValueError, match=r"p=1\.0.*below 1"):
        kernels.shrink_dropped(x, A, p=1.0, seed=kernels.draw_seed(DEVICE))
    with pytest.raises(ValueError, match="there is no routing"):
        kernels.shrink_dropped(x, A, scales=torch.ones(1, device=DEVICE))
    with pytest.raises(ValueError, match="act='relu'.*silu, gelu_tanh"):
        kernels.gate_forward(x, x, "relu")
    for dm in (x[:, :1].expand(2, 16), x.bfloat16()):
        with pytest.raises(ValueError, match=r"written over it; make it contiguous and torch\.float32"):
            kernels.gate_backward_(dm, x, x)
    routing = kernels.route_rows(torch.zeros(2, dtype=torch.int32, device=DEVICE), 3)
    for wrong in (
        lambda: kernels.shrink_dropped(x, random(4, 15)),
        lambda: kernels.shrink_dropped(x, A, routing=routing),
        lambda: kernels.shrink_dropped(x, A.expand(2, -1, -1), routing=routing),
        lambda: kernels.shrink_dropped(random(3, 16), A.expand(3, -1, -1), routing=routing),
        lambda: kernels.expand_add_(x, random(1, 4), A.T),
        lambda: kernels.expand_add_(x, random(2, 4), A),
        lambda: kernels.outer_product(random(3, 4), x),
        lambda: kernels.gate_forward(x, x[:1]),
    ):
        with pytest.raises(ValueError, match="its shape is"):
            wrong()


def test_available_here() -> None:
    assert kernels.is_available(random(1, 1))
    assert not kernels.is_available(random(1, 1).double())  # sums are in float32


# Layers: the same functions as on a CPU, with these kernels in them.


def share(K: int, N: int, r: int = 4, p: float = 0.0, *, b: bool = True, d: bool = False) -> Share:
    """A layer whose trained parameters are in float32."""
    made = Share(random(N, K) / K**0.5, random(N), random(r, K) / K**0.5, random(N, r), random(N), 0.5, p)
    return made._replace(b=made.b if b else None, d=made.d if d else None)


def leaves(shares: Sequence[Share], dtype: torch.dtype, trained: str) -> list[Share]:
    """Copies of which some take gradients; the base in `dtype`, the rest in at least float32."""

    def leaf(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        wide = torch.promote_types(dtype, torch.float32)
        return value.detach().to(dtype if name == "W" else wide, copy=True).requires_grad_(name in trained)

    return [Share(*(leaf(n, v) for n, v in one._asdict().items())) for one in shares]


def by_definition(x: Tensor, one: Share, keep: Tensor | float) -> Tensor:
    """A layer's output; `keep` is the mask, scaled."""
    y = x @ one.W.T + one.scale * ((x * keep) @ one.A.T) @ one.B.T
    return (y if one.d is None else y * one.d) + (0 if one.b is None else one.b)


def same_gradients(ours: Sequence[Share], theirs: Sequence[Share], dtype: torch.dtype) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine._asdict().items():
            if isinstance(value, Tensor) and value.requires_grad:
                close(value.grad, getattr(other, name).grad, dtype, loss=6)


class Watch:
    """What the layers call in `kernels`, in turn."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.seeds: list[int] = []
        for name in ("shrink_dropped", "expand_add_", "outer_product", "gate_forward", "gate_backward_", "draw_seed"):
            patch.setattr(kernels, name, partial(self.note, name, getattr(kernels, name)))
        patch.setattr(linear, "SMALL", 1)  # else small inputs take the way of few calls

    def note(self, name: str, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        made = function(*args, **kwargs)
        self.calls.append(name)
        if name == "draw_seed":
            self.seeds.append(int(made))
        return made

    def keep(self, at: int, rows: int, columns: int, p: float) -> Tensor | float:
        """The mask of the dropout that was drawn `at`, scaled."""
        return mask_of(torch.tensor([self.seeds[at]]), rows, columns, p).double() / (1 - p) if p else 1.0


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(dropout, "draw_mask", None)  # no mask is kept
    return Watch(monkeypatch)


def saved(y: Tensor) -> list[Tensor]:
    return [t for t in y.grad_fn.saved_tensors if t is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", ["x A B", "x A B b d", "B", "A"])
def test_siblings_with_dropout(watch: Watch, trained: str, dtype: torch.dtype) -> None:
    M, K, p = 37, 90, 0.3
    shares = [share(K, 40, p=p), share(K, 24, 8, p=p, d=True), share(K, 40, p=p, b=False)]
    x, ups = random(2, M, K, dtype=dtype), [random(2, M, N, dtype=dtype) for N in (40, 24, 40)]
    ours, theirs = leaves(shares, dtype, trained), leaves(shares, torch.float64, trained)
    x.requires_grad_("x" in trained)
    wide = x.detach().double().requires_grad_("x" in trained)
    ys = linear.run(x, tuple(ours))
    assert watch.calls == ["draw_seed", "shrink_dropped"]  # one mask, one product
    keep = watch.keep(0, 2 * M, K, p).view(2, M, K)
    wanted = [by_definition(wide, one, keep) for one in theirs]
    for y, expected in zip(ys, wanted, strict=True):
        close(y, expected, dtype, loss=3)
    torch.autograd.backward(ys, ups)
    torch.autograd.backward(wanted, [up.double() for up in ups])
    assert watch.calls[2:] == ["expand_add_"] * ("x" in trained) + ["outer_product"] * ("A" in trained)
    same_gradients(ours, theirs, dtype)
    if "x" in trained:
        close(x.grad, wide.grad, dtype, loss=6)


def test_plain_products_are_not_ours(watch: Watch) -> None:
    x, shares = random(30, 64).requires_grad_(), leaves([share(64, 20), share(64, 24)], torch.float32, "A B")
    sum(y.sum() for y in linear.run(x, tuple(shares))).backward()
    assert watch.calls == []


def test_a_seed_is_kept_and_no_mask(watch: Watch) -> None:
    x, (one,) = random(64, 64).requires_grad_(), leaves([share(64, 32, p=0.1)], torch.float32, "A B")
    (y,) = linear.run(x, (one,))
    kept = saved(y)
    assert [t.numel() for t in kept if t.dtype == torch.int64] == [1]
    assert all(t.is_floating_point() for t in kept if t.numel() > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("act", "plain", "trained", "p", "down_p"), [
    (nn.SiLU(), F.silu, "x A B", 0.0, 0.0),
    (nn.SiLU(), F.silu, "x A B d", 0.2, 0.4),
    (nn.SiLU(), F.silu, "x B", 0.2, 0.2),
    (NewGELUActivation(), PLAIN["gelu_tanh"], "A B", 0.0, 0.3),
    (nn.GELU(approximate="tanh"), PLAIN["gelu_tanh"], "x A B", 0.3, 0.0),
])  # fmt: skip
def test_gated_network(
    watch: Watch,
    act: nn.Module,
    plain: Callable[[Tensor], Tensor],
    trained: str,
    p: float,
    down_p: float,
    dtype: torch.dtype,
) -> None:
    M, K, width = 21, 40, 70
    shares = [share(K, width, p=p), share(K, width, 8, p=p, d="d" in trained), share(width, K, p=down_p)]
    x, up = random(M, K, dtype=dtype), random(M, K, dtype=dtype)
    ours, theirs = leaves(shares, dtype, trained), leaves(shares, torch.float64, trained)
    x.requires_grad_("x" in trained)
    wide = x.detach().double().requires_grad_("x" in trained)
    y = gated.run(x, act, tuple(ours))
    kept = saved(y)
    assert sum(t.shape == (M, width) for t in kept) <= 2 + ("d" in trained)  # e, g, and what d scales
    keep, down_keep = watch.keep(0, M, K, p), watch.keep(-1, M, width, down_p)
    e, g = (by_definition(wide, one, keep) for one in theirs[:2])
    wanted = by_definition(plain(e) * g, theirs[2], down_keep)
    close(y, wanted, dtype, loss=4)
    y.backward(up)
    wanted.backward(up.double())
    assert watch.calls.count("gate_forward") == watch.calls.count("gate_backward_") == 1
    assert watch.calls.count("outer_product") == ("A" in trained) * ((p > 0) + (down_p > 0))
    same_gradients(ours, theirs, dtype)
    if "x" in trained:
        close(x.grad, wide.grad, dtype, loss=6)
    with torch.no_grad():
        eval_ = gated.run(x, act, tuple(one._replace(dropout=0.0) for one in ours))
    e, g = (by_definition(wide, one, 1.0) for one in theirs[:2])
    close(eval_, by_definition(plain(e) * g, theirs[2], 1.0), dtype, loss=4)
    assert watch.calls.count("gate_forward") == 2


def test_other_activations_keep_pytorchs_operations(watch: Watch) -> None:
    x, shares = random(9, 16), (share(16, 24), share(16, 24), share(24, 16))
    for act in (nn.GELU(), nn.ReLU(), nn.Mish()):
        e, g = (by_definition(x, one, 1.0) for one in shares[:2])
        close(gated.run(x, act, shares), by_definition(act(e) * g, shares[2], 1.0), torch.float32, loss=4)
    assert watch.calls == []


def test_no_rows_in_a_layer(watch: Watch) -> None:
    x, (one,) = random(0, 64).requires_grad_(), leaves([share(64, 32, p=0.1)], torch.float32, "A B")
    rules = (1, (0.5,), 0.1, torch.float32)
    (y,) = linear.apply(linear.FactoredLinear, x, rules, one.W, one.b, one.A, one.B, None)
    assert watch.calls == ["draw_seed", "shrink_dropped"]
    y.sum().backward()
    assert torch.equal(one.A.grad, torch.zeros_like(one.A)) and torch.equal(one.B.grad, torch.zeros_like(one.B))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(32, 32), Network()
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)

    def run(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.first(x))


def adapted(p: float) -> nn.Module:
    config = veneer.LoraConfig(r=4, target_modules=["first", "gate", "up", "down"], lora_dropout=p)
    model = veneer.get_peft_model(Block().to(DEVICE), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def test_a_model_is_served_by_them(watch: Watch) -> None:
    model, x = adapted(0.0).train(), random(4, 8, 32)
    found = step(model, x)
    assert watch.calls == ["gate_forward", "gate_backward_"]
    with reference_only():
        wanted = step(model, x)
    assert watch.calls == ["gate_forward", "gate_backward_"]
    for mine, other in zip(found, wanted, strict=True):
        close(mine, other, torch.float32, loss=4)


def test_checkpointing_and_manual_seed_give_the_same_masks(watch: Watch) -> None:
    model, x = adapted(0.5).train(), random(4, 8, 32).requires_grad_()
    found = []
    for checkpointed in (False, True, False):
        model.get_base_model().checkpointed = checkpointed
        torch.manual_seed(3)
        found.append(step(model, x))
    assert watch.seeds[:3] == watch.seeds[3:6] == watch.seeds[6:9] == watch.seeds[9:] and len(set(watch.seeds)) == 3
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(found[0][0], step(model, x)[0])


def test_without_triton_a_layer_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    monkeypatch.setattr(kernels, "is_installed", lambda: False)
    model, x = adapted(0.25).train(), random(4, 8, 32).requires_grad_()
    step(model, x)
    assert watch.calls == []
    (y,) = linear.run(x.flatten(0, 1), tuple(leaves([share(32, 16, p=0.25)], torch.float32, "A B")))
    assert [t.shape for t in saved(y) if t.dtype == torch.int16] == [(32, 2)]
