"""Rows of one batch with adapters of their own: the same outputs and gradients as each row run alone."""

from __future__ import annotations

import copy
import io
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from models import IDS, MODELS
from small import deviation, llama, scramble
from veneer.injection.interceptors import SplitRows
from veneer.kernels import mixed, routed

BASE = "__base__"
NAMES = ("a", "b", "c")
ROWS = ["b", BASE, "a", "b", "c", "a"]
MIXED = torch.cat([IDS, (IDS * 5 + 2) % 60 + 3, (IDS * 11 + 1) % 60 + 3])  # (6, 12)
WAYS = [*routed.STRATEGIES, None]
ways = pytest.mark.parametrize("way", WAYS, ids=str)


@pytest.fixture
def loops(monkeypatch: Any) -> list[str]:
    """The layers that ran one adapter after another."""
    seen: list[str] = []
    before = SplitRows.run

    def counted(self: SplitRows, call: Any, args: Any, kwargs: Any, proceed: Any) -> Any:
        main = None if self.weights is None else self.weights.main
        if main is not None and any(n in main.entries for n in call.router.rows()):
            seen.append(main.name)
        return before(self, call, args, kwargs, proceed)

    monkeypatch.setattr(SplitRows, "run", counted)
    return seen


def forced(way: str | None) -> Any:
    return nullcontext() if way is None else routed.force_strategy(way)


def three(base: nn.Module, **options: Any) -> Any:
    """Three LoRAs of different ranks, scales and targets."""
    options = {"target_modules": "all-linear", **options}
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, **options), "a")
    model.add_adapter("b", veneer.LoraConfig(r=2, lora_alpha=5, use_rslora=True, **options))
    model.add_adapter("c", veneer.LoraConfig(r=6, **{**options, "exclude_modules": r".*(\.0\.|v_proj|attn).*"}))
    scramble(model, 3)
    return model.eval()


def call(model: Any, ids: Tensor, **more: Any) -> Tensor:
    if "T5" in type(model.get_base_model()).__name__:
        more["decoder_input_ids"] = ids[:, :5]
    return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


def alone(model: Any, rows: list[str], ids: Tensor) -> Tensor:
    """Each row in a batch of its own."""
    outs = []
    for i, name in enumerate(rows):
        with model.disable_adapter() if name == BASE else model.use_adapter(name):
            outs.append(call(model, ids[i : i + 1]))
    return torch.cat(outs)


def weigh(y: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape).sin().to(y.dtype)
    return (y * weights).sum()


def gradients(model: Any) -> dict[str, Tensor | None]:
    found = {n: p.grad for n, p in model.named_parameters() if ":" in n}
    model.zero_grad(set_to_none=True)
    return found


def same_gradients(model: Any, mixed_loss: Tensor, single_loss: Tensor, tolerance: float = 1e-4) -> None:
    mixed_loss.backward()
    got = gradients(model)
    single_loss.backward()
    want = gradients(model)
    for name, g in want.items():
        other = got[name]
        assert (g is None) == (other is None), name
        if g is not None:
            torch.testing.assert_close(other, g, atol=tolerance, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@ways
@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "gpt2"])
def test_outputs_and_gradients_are_those_of_each_row_alone(arch: str, way: str | None, loops: list[str]) -> None:
    model = three(MODELS[arch].make())
    want = alone(model, ROWS, MIXED)
    with forced(way):
        got = call(model, MIXED, adapter_names=ROWS)
        with torch.no_grad():
            torch.testing.assert_close(call(model, MIXED, adapter_names=ROWS), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert (want[1] - want[0]).abs().max() > 1e-3 and (alone(model, ["a"] * 6, MIXED) - want).abs().max() > 1e-3
    same_gradients(model, weigh(got), weigh(want))
    assert not loops


def test_gradients_reach_only_the_adapters_in_the_batch() -> None:
    model = three(llama())
    weigh(call(model, MIXED[:2], adapter_names=["b", BASE])).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith(":b"), name


@ways
def test_many_adapters(way: str | None, loops: list[str]) -> None:
    base = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=1, target_modules=["0", "2"]), "n0")
    for i in range(1, 80):  # more than the tables that are kept hold
        model.add_adapter(f"n{i}", veneer.LoraConfig(r=i % 5 + 1, lora_alpha=i, target_modules=["0", "2"][i % 2 :]))
    scramble(model)
    for seed, shape in enumerate([(100, 24), (50, 3, 24), (100, 2, 2, 24)]):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator)
        picks = torch.randint(-1, 80, (50,), generator=generator).tolist()
        rows = [BASE if i < 0 else f"n{i}" for i in picks]
        want = []
        for i, name in enumerate(rows):
            own = x[i * (shape[0] // 50) : (i + 1) * (shape[0] // 50)]
            with model.disable_adapter() if name == BASE else model.use_adapter(name):
                want.append(model(own))
        with forced(way):
            got = model(x, adapter_names=rows) if shape[0] == 50 else hold(model, rows, x)
            with torch.no_grad():
                few = ["n3"] * 25 + ["n4"] * 25
                hold(model, few, x)
                quiet = hold(model, rows, x)
        torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(quiet, got, atol=1e-5, rtol=1e-4)
    assert not loops


def hold(model: Any, rows: list[str], x: Tensor) -> Tensor:
    """A call in which each row of the batch is repeated, as for beams."""
    from veneer.injection.router import Rows

    with model.runtime.router.hold(rows=Rows(rows)):
        return model.get_base_model()(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS[:3])
def test_half_precision_and_autocast(way: str, loops: list[str]) -> None:
    full = three(llama())
    want = alone(full, ROWS, MIXED)
    weigh(want).backward()
    exact = gradients(full)
    half = three(llama(dtype=torch.bfloat16))
    assert {p.dtype for n, p in half.named_parameters() if ":" in n} == {torch.float32}
    for model, context in ((half, nullcontext()), (full, torch.autocast("cpu", torch.bfloat16))):
        with forced(way), context:
            got = call(model, MIXED, adapter_names=ROWS)
            with torch.no_grad():
                quiet = call(model, MIXED, adapter_names=ROWS)
            own = alone(model, ROWS, MIXED)
        assert got.dtype == torch.bfloat16
        for y in (got, quiet):
            assert (y - want).abs().max() < 0.03 * want.abs().max()
        weigh(got.float()).backward()
        ours = gradients(model)
        weigh(own.float()).backward()
        theirs = gradients(model)
        assert {g.dtype for g in ours.values() if g is not None} == {torch.float32}
        off = [sum((g[n] - exact[n]).square().sum() for n in exact) for g in (ours, theirs)]  # type: ignore[operator]
        assert off[0] <= 2 * off[1]
    assert not loops


@ways
def test_dropout(way: str | None, loops: list[str]) -> None:
    """The adapters' input is dropped as a whole, with the same probability for all of them."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 12)
    model = veneer.get_peft_model(
        nn.Sequential(layer), veneer.LoraConfig(r=3, lora_dropout=0.5, target_modules=["0"]), "a"
    )
    model.add_adapter("b", veneer.LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"]))
    scramble(model)
    x, rows = torch.randn(6, 4, 16), ["a", "b", BASE, "a", "b", "b"]
    model.train()
    with forced(way):
        torch.manual_seed(5)
        got = model(x, adapter_names=rows)
        torch.manual_seed(5)
        z = nn.functional.dropout(x, 0.5)
        p = dict(layer.named_parameters())
        want = nn.functional.linear(x, p["weight"], p["bias"])
        for i, name in enumerate(rows):
            if name != BASE:
                r = p[f"lora_A:{name}"].shape[0]
                want = want.index_add(
                    0, torch.tensor(i), (8 / r * z[i] @ p[f"lora_A:{name}"].T @ p[f"lora_B:{name}"].T)[None]
                )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(model.eval()(x, adapter_names=rows), model.train().eval()(x, adapter_names=rows))
    assert not loops
    model.add_adapter("c", veneer.LoraConfig(r=2, lora_dropout=0.1, target_modules=["0"]))
    model.train()(x, adapter_names=["a", "c"] * 3)
    assert loops == ["0"]  # each with its own


@torch.no_grad()
def test_beams(loops: list[str]) -> None:
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    for arch in ("llama", "t5"):
        model = three(MODELS[arch].make())
        got = model.generate(input_ids=MIXED, adapter_names=ROWS, **options)
        for i, name in enumerate(ROWS):
            with model.disable_adapter() if name == BASE else model.use_adapter(name):
                want = model.generate(input_ids=MIXED[i : i + 1], **options)
            assert got[i, : want.shape[1]].tolist() == want[0].tolist()
    assert not loops


METHODS: dict[str, Any] = {
    "ia3": lambda: veneer.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: veneer.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "dora": lambda: veneer.LoraConfig(r=3, use_dora=True, target_modules="all-linear"),
    "biased": lambda: veneer.LoraConfig(r=3, lora_bias=True, target_modules=["q_proj", "o_proj"]),
    "pfeiffer": lambda: veneer.BottleneckConfig(width=6),
    "parallel": lambda: veneer.BottleneckConfig(kind="parallel", width=6, scaling="learned"),
    "houlsby": lambda: veneer.BottleneckConfig(kind="houlsby", width=6, original_ln_after=False),
    "copy": lambda: veneer.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "pissa": lambda: veneer.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_other_methods_row_by_row(kind: str, train: bool) -> None:
    model = veneer.get_peft_model(llama(), veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), "a")
    model.add_adapter("b", METHODS[kind]())
    model.add_adapter("c", METHODS[kind]())
    scramble(model)
    model.train(train)
    want = alone(model, ROWS, MIXED)
    got = call(model, MIXED, adapter_names=ROWS)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert (want[0] - alone(model, [BASE], MIXED[:1])[0]).abs().max() > 1e-3
    same_gradients(model, weigh(got), weigh(want))


@pytest.mark.parametrize("arch", ["bert", "t5", "gpt2"])
def test_bottlenecks_on_other_architectures(arch: str) -> None:
    model = veneer.get_peft_model(MODELS[arch].make(), veneer.BottleneckConfig(width=6), "a")
    model.add_adapter("b", veneer.BottleneckConfig(kind="houlsby", width=4))
    model.add_adapter("c", veneer.LoraConfig(r=3, target_modules="all-linear"))
    scramble(model)
    want, got = alone(model, ROWS, MIXED), call(model, MIXED, adapter_names=ROWS)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    same_gradients(model, weigh(got), weigh(want))


@torch.no_grad()
def test_a_fusion_in_some_rows() -> None:
    model = veneer.get_peft_model(llama(), veneer.BottleneckConfig(width=6), "a")
    model.add_adapter("b", veneer.BottleneckConfig(width=4))
    model.add_adapter("c", veneer.AdapterFusionConfig(adapter_names=["a", "b"]))
    scramble(model)
    torch.testing.assert_close(call(model, MIXED, adapter_names=ROWS), alone(model, ROWS, MIXED), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """The blocks are computed again after the call, and still with its rows."""
    model = three(llama())
    model.add_adapter("ia3", METHODS["ia3"]())
    scramble(model)
    rows = ["b", "ia3", BASE, "c", "a", "b"]
    model.train()
    want = alone(model, rows, MIXED)
    weigh(want).backward()
    plain = gradients(model)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()
    for _ in range(2):
        got = call(model, MIXED, adapter_names=rows)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        weigh(got).backward()
        for name, g in gradients(model).items():
            if plain[name] is not None:
                torch.testing.assert_close(g, plain[name], atol=1e-4, rtol=1e-3)
    with model.use_adapter("c"):
        loss = weigh(call(model, MIXED))
    loss.backward()
    assert {n.rpartition(":")[2] for n, g in gradients(model).items() if g is not None and g.abs().max() > 0} == {"c"}
    twin = copy.deepcopy(model)
    weigh(call(twin, MIXED, adapter_names=rows)).backward()
    assert gradients(twin).keys() == plain.keys() and not any(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_threads() -> None:
    model = three(llama())
    plans = [ROWS, ["c"] * 6, [BASE, "a"] * 3, ["a", "b", "c"] * 2]
    wanted = [alone(model, rows, MIXED) for rows in plans]
    wrong: list[Any] = []

    def run(i: int) -> None:
        for _ in range(10):
            got = call(model, MIXED, adapter_names=plans[i])
            if deviation(got, wanted[i]) > 3e-5:
                wrong.append(i)

    torch.set_grad_enabled(True)  # of this thread; the others have it, too
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@torch.no_grad()
def test_copies_and_pickles_bring_no_tables() -> None:
    model = three(llama())
    fresh = len(pickled(model))
    want = call(model, MIXED, adapter_names=ROWS)
    assert model.runtime.router.kept and len(pickled(model)) <= fresh + 2_000
    for twin in (copy.deepcopy(model), torch.load(io.BytesIO(pickled(model)), weights_only=False)):
        assert not twin.runtime.router.kept
        torch.testing.assert_close(call(twin, MIXED, adapter_names=ROWS), want)
        scramble(twin, 9)
        assert (call(twin, MIXED, adapter_names=ROWS) - want).abs().max() > 1e-3
    torch.testing.assert_close(call(model, MIXED, adapter_names=ROWS), want)


def pickled(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def test_tables_follow_the_adapters(tmp_path: Any) -> None:
    model = three(llama())

    def check() -> None:
        with torch.no_grad():
            got = call(model, MIXED, adapter_names=ROWS)
            torch.testing.assert_close(got, alone(model, ROWS, MIXED), atol=3e-5, rtol=1e-4)

    check()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    weigh(call(model, MIXED, adapter_names=ROWS)).backward()
    optimizer.step()
    check()
    model.save_pretrained(tmp_path)
    site = model.runtime.sites["model.layers.1.self_attn.q_proj"]
    parameter = site.tensors("b")["B"]
    parameter.data = parameter.data * -2  # another storage, which torch does not count
    check()
    model.delete_adapter("b")
    model.add_adapter("b", veneer.LoraConfig(r=5, target_modules=["q_proj"]))
    scramble(model, 4)
    check()
    model.delete_adapter("b")
    model.load_adapter(tmp_path / "b", "b")
    check()
    scaled = {k: t * 1.5 if ":" in k else t for k, t in model.state_dict().items()}
    model.load_state_dict(scaled, assign=True)  # other parameters under the same names
    check()
    model.set_adapter("c")
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        call(model, MIXED, adapter_names=ROWS)
    model.unmerge_adapter()
    check()
    model.double()
    with torch.no_grad():
        got = call(model, MIXED, adapter_names=ROWS)
        torch.testing.assert_close(got, alone(model, ROWS, MIXED), atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_a_deleted_adapter_is_not_kept_alive() -> None:
    model = three(llama())
    call(model, MIXED, adapter_names=ROWS)
    parameter = weakref.ref(model.runtime.sites["model.layers.1.mlp.up_proj"].tensors("b")["A"])
    model.delete_adapter("b")
    assert parameter() is None


@torch.no_grad()
def test_frozen_adapters_are_stacked_once(monkeypatch: Any) -> None:
    model, stacked = three(llama()), []
    before = mixed.Mixed.stack
    monkeypatch.setattr(mixed.Mixed, "stack", lambda self, *a: stacked.append(self.site.name) or before(self, *a))
    for _ in range(3):
        call(model, MIXED, adapter_names=ROWS)
        call(model, MIXED, adapter_names=ROWS[::-1])
    assert len(stacked) == len(set(stacked)) > 0
    with torch.inference_mode():
        call(model, MIXED, adapter_names=ROWS)
    assert len(stacked) == len(set(stacked))
    model.set_requires_grad(NAMES, False)
    with torch.enable_grad():
        x = model.get_input_embeddings()(MIXED).requires_grad_()
        model(inputs_embeds=x, adapter_names=ROWS).logits.sum().backward()
    assert x.grad is not None and len(stacked) == len(set(stacked))


def test_names() -> None:
    model = three(llama())
    with pytest.raises(ValueError, match="no adapter is named 'aa'.*did you mean 'a'"):
        call(model, MIXED, adapter_names=["aa"] * 6)
    with pytest.raises(ValueError, match="for 2 rows, but the batch has 6"):
        call(model, MIXED, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="must be one of dense, gather, grouped"), routed.force_strategy("fast"):
        pass
    with torch.no_grad():
        torch.testing.assert_close(call(model, MIXED, adapter_names=[BASE] * 6), alone(model, [BASE] * 6, MIXED))


def test_bare_parameters_are_still_refused() -> None:
    model = veneer.get_peft_model(
        MODELS["mixtral"].make(), veneer.LoraConfig(r=2, target_parameters=["experts.down_proj"])
    )
    with pytest.raises(ValueError, match="cannot be told apart by row here"):
        model(input_ids=MIXED, adapter_names=["default"] * 6)


# One slot a token.


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_add(way: str | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    for M, S in ((40, 5), (7, 1), (3, 6)):
        y, x, A, B = drawn(M, 12), drawn(M, 16), drawn(S, 8, 16), drawn(S, 12, 8)
        scales, slots = torch.rand(S, generator=generator), torch.randint(-1, S, (M,), generator=generator)
        slots[0] = -1
        rows = [
            y[i] + (scales[s] * (x[i].float() @ A[s].float().T) @ B[s].float().T if s >= 0 else 0)
            for i, s in enumerate(slots.tolist())
        ]
        want = torch.stack(rows)
        inputs = (y, x, A, B)
        expected = torch.autograd.grad(weigh(want), inputs)
        with forced(way):
            got = routed.routed_add(y, x, A, B, scales, slots)
            quiet = routed.routed_add(*(t.detach() for t in inputs), scales, slots.int())
        found = torch.autograd.grad(weigh(got), inputs)
        close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
        for one, two in zip((got, quiet, *found), (want, want, *expected), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, two, check_dtype=False, **close)
        assert torch.equal(got[0], y[0])


def test_routed_add_refuses() -> None:
    y, x, A, B, scales = torch.ones(3, 4), torch.ones(3, 5), torch.ones(2, 2, 5), torch.ones(2, 4, 2), torch.ones(2)
    with pytest.raises(ValueError, match="slots 0 to 2; must be from 0 to 1, or -1"):
        routed.routed_add(y, x, A, B, scales, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"B \(2, 2, 4\).*must be"):
        routed.routed_add(y, x, A, B.mT, scales, torch.tensor([0, 1, 1]))
    assert routed.routed_add(y[:0], x[:0], A, B, scales, torch.zeros(0, dtype=torch.int64)).shape == (0, 4)


def test_shapes_choose_the_strategy() -> None:
    def chosen(rows: int, tokens: int, adapters: int, width: int, dtype: torch.dtype = torch.float32) -> str:
        batch = routed.Batch(torch.randperm(rows) % adapters, adapters)
        return routed.choose_strategy(batch, tokens, 8, width, width, dtype, torch.device("cpu"))

    assert chosen(32, 16, 32, 512) == "gather"  # many tokens, many adapters
    assert chosen(512, 1, 2, 512) == "dense"  # few adapters
    assert chosen(512, 1, 64, 512) == "grouped"  # many rows, many adapters
    assert chosen(32, 1, 32, 1024, torch.bfloat16) == "grouped"


@torch.no_grad()
def test_compiled() -> None:
    """A compiled model takes rows, and is compiled again for others; slots are for where that matters."""
    torch._dynamo.reset()
    model = three(llama())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (ROWS, ROWS[::-1]):
        got = compiled(input_ids=MIXED, adapter_names=rows, use_cache=False).logits
        torch.testing.assert_close(got, alone(model, rows, MIXED), atol=2e-5, rtol=1e-4)


def test_a_parametrized_layer_runs_on_its_own() -> None:
    """Its weight is no parameter of its own any more."""
    model = three(llama())
    expected = call(model, MIXED, adapter_names=ROWS)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    torch.testing.assert_close(call(model, MIXED, adapter_names=ROWS), expected)
