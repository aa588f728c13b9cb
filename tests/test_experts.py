"""Adapters of experts act on the routed tokens; no weight of all experts is formed, and results are those of one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import veneer
from models import EXPERTS, MOE, auto
from small import scramble
from table import Holder, Model
from veneer.algebra.low_rank import Factored
from veneer.algebra.operators import Diagonal
from veneer.algebra.recursion import Branches, Term
from veneer.algebra.sums import Sum
from veneer.layers.lazy_weight import Lazy, LowRank, lazy_weight, make_lazy
from veneer.layers.parameter import Parameter

# 7 experts, and other counts of tokens: nothing else is as large as the weight of all experts.
MAKE: dict[str, Callable[[], Any]] = {
    "mixtral": auto("CausalLM", "MixtralConfig", **MOE, num_local_experts=7),
    "qwen3_moe": auto("CausalLM", "Qwen3MoeConfig", **MOE, num_experts=7, moe_intermediate_size=40, head_dim=8),
    "gpt_oss": auto("CausalLM", "GptOssConfig", **MOE, num_local_experts=7, head_dim=8),
}
WAYS = ("eager", "batched_mm", "grouped_mm")
every = pytest.mark.parametrize("way", WAYS)
models = pytest.mark.parametrize("name", MAKE)


def adapted(name: str, way: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = MAKE[name]().to(dtype)
    base.config._experts_implementation = way
    config = veneer.LoraConfig(**{"r": 3, "target_modules": [], "target_parameters": list(EXPERTS), **options})
    model = veneer.get_peft_model(base, config)
    scramble(model)
    return model.eval()


def embedded(tokens: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, tokens, 32, generator=generator).to(dtype).requires_grad_()  # (1, tokens, hidden)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradients of every trained tensor and of x."""
    model.zero_grad()
    x.grad = None
    logits = model(inputs_embeds=x).logits
    logits.float().square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(grads) == sum(p.requires_grad for p in model.parameters())
    assert x.grad is not None
    return {"logits": logits.detach(), "x": x.grad.clone(), **grads}


def compare(own: dict[str, Tensor], other: dict[str, Tensor], bar: float = 1e-5) -> None:
    assert own.keys() == other.keys()
    for name, value in own.items():
        gap = (value.float() - other[name].float()).norm() / other[name].float().norm()
        assert gap <= bar and other[name].any(), (name, float(gap))


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The effective weight, formed: what everything here has to equal."""

    @contextmanager
    def formed() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(Parameter, "lazy", lambda *_: None)
            yield

    return formed


class Watch(TorchDispatchMode):
    """What is made, or saved for the backward, that is as large as a weight of all experts and is not the base's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        weights = [p for n, p in model.named_parameters() if n.endswith(("down_proj", "gate_up_proj")) and p.ndim == 3]
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.least = min(w.numel() for w in weights)
        self.made: list[str] = []
        self.saved: list[tuple[int, ...]] = []
        self.ups: list[tuple[int, ...]] = []
        self.hooks = saved_tensors_hooks(self.pack, lambda t: t)

    def large(self, t: Any) -> bool:
        return isinstance(t, Tensor) and t.numel() >= self.least and t.untyped_storage()._cdata not in self.own

    def pack(self, t: Tensor) -> Tensor:
        if self.large(t):
            self.saved.append(tuple(t.shape))
        return t

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [f"{func}: {tuple(t.shape)}" for t in tree_leaves(out) if self.large(t)]
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16 and out.dtype == torch.float32:
            self.ups.append(tuple(out.shape))
        return out

    def __enter__(self) -> Watch:
        self.hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.__exit__(*error)


@every
@models
def test_outputs_and_gradients_are_those_of_the_effective_weight(name: str, way: str, dense: Any) -> None:
    model, x = adapted(name, way), embedded()
    own = step(model, x)
    with dense():
        compare(own, step(model, x))
    with torch.no_grad():
        model.merge_adapter()
        merged = model(inputs_embeds=x).logits
        model.unmerge_adapter()
    compare({"logits": own["logits"]}, {"logits": merged})
    with model.disable_adapter():
        off = model(inputs_embeds=x).logits
    assert torch.equal(off, model.unload()(inputs_embeds=x).logits)
    assert (off - merged).norm() > 1e-3 * merged.norm()


@every
@models
def test_no_weight_of_all_experts_is_made_or_saved(name: str, way: str, dense: Any) -> None:
    model, x = adapted(name, way), embedded()
    with Watch(model) as seen:
        step(model, x)
    assert not seen.made and not seen.saved
    with torch.no_grad(), Watch(model) as seen:
        model(inputs_embeds=x)
        model(inputs_embeds=x[:, :1])  # fewer tokens than experts
    assert not seen.made
    with dense(), Watch(model) as seen:  # it would have been seen
        step(model, x)
    assert len(seen.made) >= 4


@every
@models
@pytest.mark.parametrize("tokens", [1, 2, 10])
def test_inference_and_few_tokens(name: str, way: str, tokens: int, dense: Any) -> None:
    model, x = adapted(name, way), embedded(tokens)
    with torch.no_grad():
        own = model(inputs_embeds=x).logits
        with dense():
            compare({"logits": own}, {"logits": model(inputs_embeds=x).logits})


def no_more_upcasts_than_the_base(model: Any, x: Tensor) -> None:
    with Watch(model) as seen:
        model(inputs_embeds=x)
    with model.disable_adapter(), Watch(model) as base:
        model(inputs_embeds=x)
    assert sorted(seen.ups) == sorted(base.ups), "an activation was cast up"


@every
@models
def test_bf16_base(name: str, way: str, dense: Any) -> None:
    """Parameters in float32, everything that is computed in bfloat16."""
    model, x = adapted(name, way, torch.bfloat16), embedded(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    own = step(model, x)
    with dense():
        compare(own, step(model, x), 3e-2)
    no_more_upcasts_than_the_base(model, x)


@every
@models
def test_autocast(name: str, way: str, dense: Any) -> None:
    model, x = adapted(name, way), embedded()
    with torch.autocast("cpu", torch.bfloat16):
        own = step(model, x)
        with dense():
            compare(own, step(model, x), 4e-2)
        no_more_upcasts_than_the_base(model, x)


@every
def test_several_adapters(way: str, dense: Any) -> None:
    """A stack and an average, of unequal ranks, with a scale each."""
    model, x = adapted("mixtral", way), embedded()
    for name, r in (("second", 5), ("third", 2)):
        model.add_adapter(
            name, veneer.LoraConfig(r=r, lora_alpha=3 * r, target_modules=[], target_parameters=list(EXPERTS))
        )
    scramble(model, 2)
    for active in (["default", "second"], veneer.Average("default", ["second", "third"], weights=[1, 3])):
        model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(":" in name and (isinstance(active, veneer.Average) or "third" not in name))
        with Watch(model) as seen:
            own = step(model, x)
        assert not seen.made
        with dense():
            compare(own, step(model, x))


@every
def test_checkpointing(way: str) -> None:
    model, x = adapted("qwen3_moe", way), embedded()
    expected = step(model, x)
    for reentrant in (False, True):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        compare(step(model, x), expected, 1e-6)


def test_copies_and_threads() -> None:
    model, x = adapted("mixtral", "grouped_mm"), embedded().detach()
    model.add_adapter("second", veneer.LoraConfig(r=2, target_modules=[], target_parameters=list(EXPERTS)))
    scramble(model, 2)
    twin = copy.deepcopy(model)

    def run(chosen: str) -> Tensor:
        with twin.use_adapter(chosen), torch.no_grad():
            out: Tensor = twin(inputs_embeds=x).logits
            return out

    expected, found = {n: run(n) for n in ("default", "second")}, {}
    assert not torch.equal(expected["default"], expected["second"])
    assert torch.equal(expected["default"], model(inputs_embeds=x).logits)
    threads = [threading.Thread(target=lambda n=n: found.update({n: run(n)})) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("shape", "transposed"), [((12, 8), False), ((4, 12, 8), False), ((4, 8, 12), True)], ids=["2d", "3d", "transposed"]
)
def test_a_module_of_its_own(shape: tuple[int, ...], transposed: bool, dense: Any) -> None:
    torch.manual_seed(0)
    model = veneer.get_peft_model(
        Model(Holder(*shape, transposed=transposed)),
        veneer.LoraConfig(r=2, target_modules=[], target_parameters=["layer.matrix"]),
    )
    scramble(model)
    formed = []
    plain, Lazy.form = Lazy.form, lambda self: formed.append(1) or plain(self)
    try:
        results = []
        for way in (torch.enable_grad, dense):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            model.zero_grad()
            with way():
                y = model(x)
                y.square().sum().backward()
            trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results.append({"y": y.detach(), "x": x.grad, **trained})
    finally:
        Lazy.form = plain
    assert not formed and len(results[0]) == 4
    compare(*results)


# The weight by itself: every use of it against the effective weight.

E, OUT, IN = 5, 12, 8


class Product(torch.autograd.Function):
    """A product that knows nothing of weights that are not formed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gw = grad.transpose(-1, -2) @ x
        return grad @ weight, gw


class Doubled(torch.autograd.Function):
    """An elementwise function of a weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2


IDS = torch.tensor([3, 0, 0, -1, 2, 3])
OFFS = torch.tensor([2, 2, 5, 6, 6], dtype=torch.int32)
COLUMNS: Callable[[Tensor], Tensor] = lambda x: torch.stack([x] * E)  # (E, 6, in)  # noqa: E731

# x (6, in), w (E, out, in) -> anything; none of them needs the effective weight.
FAST: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one expert": lambda x, w: F.linear(x, w[2]),
    "one expert, counted from the back, with a bias": lambda x, w: F.linear(x, w[-1], torch.ones(OUT).to(x)),
    "one expert by a tensor": lambda x, w: x @ w[torch.tensor(1)].T,
    "a token of one expert": lambda x, w: w[1] @ x[0],
    "a batch of three axes": lambda x, w: F.linear(x.view(2, 3, IN), w[0]),
    "left": lambda x, w: w[1] @ x.T,
    "addmm": lambda x, w: torch.addmm(torch.ones(OUT).to(x), x, w[3].t(), alpha=2),
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(E, 1, OUT).to(x), COLUMNS(x), w.mT, beta=0.5),
    "bmm": lambda x, w: torch.bmm(COLUMNS(x), w.transpose(1, 2)),
    "bmm left": lambda x, w: torch.bmm(w, COLUMNS(x).mT),
    "matmul broadcast": lambda x, w: torch.matmul(x, w.transpose(-2, -1)),
    "matmul left broadcast": lambda x, w: w.matmul(x.T),
    "permute": lambda x, w: x @ w.permute(0, 2, 1),
    "there and back": lambda x, w: F.linear(x, w.mT.mT[0]),
    "taken": lambda x, w: torch.bmm(w[IDS], x.unsqueeze(-1)).squeeze(-1),
    "taken, transposed": lambda x, w: torch.bmm(x.unsqueeze(1), w[IDS].mT).squeeze(1),
    "taken, several tokens": lambda x, w: x.expand(6, 6, IN) @ w[IDS].mT,
    "grouped": lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=OFFS) * torch.ones(6, 1),
    "grouped, by its old name": lambda x, w: torch._grouped_mm(x, w.transpose(-2, -1), offs=OFFS) * torch.ones(6, 1),
    "einsum": lambda x, w: torch.einsum("ti,eoi->teo", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("eoi, ...i -> ...eo", w, x),
    "einsum, summed over experts": lambda x, w: torch.einsum("eti,eoi->to", COLUMNS(x), w),
    "einsum of one": lambda x, w: torch.einsum("ti,oi->to", x, w[4]),
    "einsum, other side": lambda x, w: torch.einsum("to,eoi->eti", F.pad(x, (0, OUT - IN)), w),
}
# What needs it, or is not known not to.
WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elementwise": lambda x, w: x @ (w * 2)[0].T,
    "slice": lambda x, w: F.linear(x, w[1:3][0]),
    "several indices": lambda x, w: F.linear(x, w[0, :4]),
    "mask": lambda x, w: F.linear(x, w[torch.tensor([False, True, False, True, False])][1]),
    "ids of two axes": lambda x, w: F.linear(x, w[IDS.view(2, 3)][0, 1]),
    "in place": lambda x, w: F.linear(x, w.mul_(2)[0]) + F.linear(x, w[0]),
    "written to": lambda x, w: x @ torch.zeros(E, OUT, IN).copy_(w)[1].T,
    "view": lambda x, w: F.linear(x, w.contiguous().view(-1, IN)),
    "reshape": lambda x, w: F.linear(x, w.reshape(E * OUT, IN)),
    "to": lambda x, w: (x.double() @ w.to(torch.float64)[1].T).float(),
    "iterated": lambda x, w: torch.stack([F.linear(x, one) for one in w]),
    "cat": lambda x, w: F.linear(x, torch.cat([w[0], w[1]])),
    "with itself": lambda x, w: x @ (w[0].T @ w[1]),
    "einsum of its diagonal": lambda x, w: x.sum() * torch.einsum("eii,t->et", w[:, :IN], torch.ones(2)),
    "rows of a matrix": lambda x, w: F.embedding(torch.tensor([1, 3]), w[0]) * x.sum(),
}
# In an autograd Function, whose backward gives the gradient of the effective weight whole.
INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inside: all": lambda x, w: Product.apply(x.expand(E, 6, IN), w),
    "inside: one expert": lambda x, w: Product.apply(x, w[3]),
    "inside: transposed": lambda x, w: Product.apply(F.pad(x, (0, OUT - IN)), w.mT[1]),
    "inside: taken": lambda x, w: Product.apply(x.unsqueeze(1), w[IDS]),
    "inside: after use": lambda x, w: F.linear(x, w[1]) + Product.apply(x, w[1]),
    "inside: elementwise": lambda x, w: Product.apply(x, Doubled.apply(w[1])),
}


def pieces(dtype: torch.dtype = torch.float32, r: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return draw(6, IN), draw(E, OUT, IN).detach(), draw(OUT, r * E), draw(E, r, IN)


def used(use: Callable[[Tensor, Tensor], Tensor], formed: bool, flipped: bool, dtype: torch.dtype) -> list[Tensor]:
    x, W, B, A = pieces(dtype)
    stacked = B.view(OUT, -1, E).permute(2, 0, 1)  # (E, out, r), as the files have it
    if formed:
        weight = W + 0.5 * stacked @ A
    else:
        stored = W.mT.contiguous() if flipped else W
        made = lazy_weight(stored, [Term(Factored(stacked, A, 0.5), None, None, None, None)], flipped=flipped)
        assert isinstance(made, Lazy)
        assert made.shape == stored.shape and made.dtype == dtype and made.ndim == 3 and made.formed is None
        weight = made.mT if flipped else made
    y = use(x, weight)
    assert type(y) is Tensor
    y.square().sum().backward()
    assert x.grad is not None and B.grad is not None and A.grad is not None
    return [y.detach(), x.grad, B.grad, A.grad]


@pytest.mark.parametrize("flipped", [False, True], ids=["", "flipped"])
@pytest.mark.parametrize("what", [*FAST, *WHOLE, *INSIDE])
def test_use(what: str, flipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    formed, plain = [], Lazy.form
    monkeypatch.setattr(Lazy, "form", lambda self: formed.append(1) or plain(self))
    use = (FAST | WHOLE | INSIDE)[what]
    own, other = (used(use, formed, flipped, torch.float32) for formed in (False, True))
    assert bool(formed) == (what in WHOLE or what == "inside: elementwise")
    for a, b in zip(own, other, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() and b.any()


@pytest.mark.parametrize("what", [n for n in FAST if not n.startswith("grouped")])
def test_use_where_there_is_no_grouped_product(what: str) -> None:
    """Float64, which torch's grouped product refuses."""
    for a, b in zip(*(used(FAST[what], formed, False, torch.float64) for formed in (False, True)), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_an_expert_that_is_not_there() -> None:
    _, W, B, A = pieces()
    weight = make_lazy(W, LowRank([(B.view(OUT, -1, E).permute(2, 0, 1), A, 1.0)], W.dtype), False)
    for index in (E, -E - 1, torch.tensor([0, E])):
        with pytest.raises(IndexError):
            weight[index]


def test_a_base_that_is_trained_too() -> None:
    grads = []
    for formed in (True, False):
        x, W, B, A = pieces()
        W.requires_grad_()
        low = LowRank([(B.view(OUT, -1, E).permute(2, 0, 1), A, 1.0)], W.dtype)
        weight = W + low.factors()[0] @ low.factors()[1] if formed else make_lazy(W, low, False)
        y = F.linear(x, weight[1]) + Product.apply(x, weight[2]) + (x.unsqueeze(1) @ weight[IDS].mT).squeeze(1)
        (y + Product.apply(x.unsqueeze(1), weight[IDS]).squeeze(1)).square().sum().backward()
        grads.append({"W": W.grad, "A": A.grad, "B": B.grad, "x": x.grad})
    compare(*grads)


def test_writing_inside_a_function_is_refused() -> None:
    class Scaling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return weight.mul_(2)

    _, W, B, A = pieces()
    weight = make_lazy(W, LowRank([(B.view(OUT, -1, E).permute(2, 0, 1), A, 1.0)], W.dtype), False)
    with pytest.raises(RuntimeError, match="cannot be written to"):
        Scaling.apply(weight)


def test_what_is_declined() -> None:
    _, W, B, A = pieces()
    B = B.view(OUT, -1, E).permute(2, 0, 1)
    low = Factored(B, A)

    def of(*links: Any, weight: Tensor = W) -> Tensor | None:
        return lazy_weight(weight, links)

    assert of(Term(low, None, None, None, None)) is not None
    assert (
        of(Term(Sum(low, low), None, None, None, None), Branches([(0.5, [Term(low, None, None, None, None)])]))
        is not None
    )
    assert of() is None
    for link in (
        Term(low, Diagonal(torch.ones(OUT)), None, None, None),
        Term(low, None, Diagonal(torch.ones(IN)), None, None),
        Term(low, None, None, torch.ones(OUT), None),
        Term(low, None, None, None, lambda x, y: y),
        Term(Diagonal(torch.ones(OUT)), None, None, None, None),
        Term(Factored(B, A, inner=torch.ones(3)), None, None, None, None),
    ):
        assert of(link) is None
        assert of(Branches([(1.0, [link])])) is None
    assert of(Term(low, None, None, None, None), weight=W.to(torch.int8)) is None
    seen = []
    torch.func.grad(lambda a: seen.append(of(Term(Factored(B, a), None, None, None, None))) or a.sum())(A)
    assert seen == [None]


def test_checkpoint_of_the_weight_alone() -> None:
    """What a checkpoint saves and computes anew is the same."""
    grads = []
    for way in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        x, W, B, A = pieces()

        def run(x: Tensor, B: Tensor, A: Tensor, W: Tensor = W) -> Tensor:
            weight = make_lazy(W, LowRank([(B.view(OUT, -1, E).permute(2, 0, 1), A, 2.0)], W.dtype), False)
            return sum(F.linear(x, weight[e]) for e in (0, 3))

        way(run, x, B, A).square().sum().backward()
        grads.append({"A": A.grad, "B": B.grad, "x": x.grad})
    compare(*grads, 1e-6)
