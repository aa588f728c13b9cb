"""Slots that never recompile, and hot swapping."""

from __future__ import annotations

import copy
import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import veneer
from models import MODELS
from small import llama, scramble
from veneer.kernels import routed
from veneer.serving.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from veneer.serving.slots import reserve_slots, slots_of

BASE = "__base__"
IDS = torch.arange(30).view(3, 10)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Any:
    """A model with ordinary adapters of several ranks, scales and targets, and the folder that they are saved to."""
    model = veneer.get_peft_model(llama(), veneer.LoraConfig(r=4, target_modules="all-linear"), "a")
    model.add_adapter("b", veneer.LoraConfig(r=3, lora_alpha=20, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("c", veneer.LoraConfig(
        r=2, use_rslora=True, rank_pattern={"v_proj": 5}, target_modules=["v_proj", "up_proj"], init_lora_weights="olora"))  # fmt: skip
    scramble(model)
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder)
    return model.eval(), folder


def wanted(source: Any, rows: list[str], ids: Tensor = IDS) -> Tensor:
    model, outs = source[0], []
    with torch.no_grad():
        for i, name in enumerate(rows):
            with model.disable_adapter() if name == BASE else model.use_adapter(name):
                outs.append(model(input_ids=ids[i : i + 1], use_cache=False).logits)
    return torch.cat(outs)


@torch.no_grad()
def out(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-4)


def reserved(**options: Any) -> tuple[Any, Any]:
    model = veneer.get_peft_model(llama(), veneer.LoraConfig(r=1, target_modules=["q_proj"])).eval()
    return model, model.reserve_slots(**{"max_adapters": 3, "max_rank": 10, **options})


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compilation_in_all(source: Any, backend: str) -> None:
    model, slots = reserved()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)

    def check(*rows: str) -> None:
        want = wanted(source, list(rows))
        close(out(compiled), want)
        close(out(model), want)

    check(BASE, BASE, BASE)
    slots.load("a", source[1] / "a")
    check(BASE, BASE, BASE)  # loaded is not used
    slots.use("a")
    check("a", "a", "a")
    slots.load("b", source[1] / "b")
    check("a", "a", "a")
    slots.use("b")
    check("b", "b", "b")
    with slots.rows(["b", BASE, "a"]):
        check("b", BASE, "a")
    check("b", "b", "b")
    slots.load("c", slots.pack(source[1] / "c"))
    slots.rows(["c", "a", "b"])
    check("c", "a", "b")
    slots.swap("a", source[1] / "b")
    check("c", "b", "b")
    slots.unload("c")
    check(BASE, "b", "b")
    slots.use(None)
    check(BASE, BASE, BASE)
    slots.load("other", source[1] / "a")
    slots.rows(["other", "b", "other"])
    check("a", "b", "a")
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["inductor"])
def test_compiled_for_real(source: Any, backend: str) -> None:
    model, slots = reserved(target_modules=["q_proj", "down_proj"])
    slots.load("b", source[1] / "b")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    for rows in (["b", BASE, "b"], [BASE, "b", BASE]):
        slots.rows(rows)
        close(out(compiled), wanted(source, rows))
    assert counter.frame_count == 1


@pytest.mark.parametrize("arch", ["bert", "t5", "gpt2"])
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    model = veneer.get_peft_model(MODELS[arch].make(), veneer.LoraConfig(r=4, target_modules="all-linear"), "a").eval()
    model.add_adapter("b", veneer.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    scramble(model)
    model.save_pretrained(tmp_path)
    base = MODELS[arch].make()
    slots = reserve_slots(base, max_adapters=2, max_rank=4)
    for name in "ab":
        slots.load(name, tmp_path / name)
    inputs = MODELS[arch].inputs()
    with torch.no_grad(), slots.rows(["b", "a"]):
        got = base(**inputs).logits
        close(got, model(**inputs, adapter_names=["b", "a"]).logits)
        slots.use("b")
        model.set_adapter("b")
        close(base(**inputs).logits, model(**inputs).logits)
    slots.release()
    with torch.no_grad(), model.disable_adapter():
        close(base(**inputs).logits, model(**inputs).logits)
    assert not any(":" in n for n, _ in base.named_buffers()) and type(base) is type(MODELS[arch].make())
    assert not any("_veneer" in m.__dict__ for m in base.modules())


@pytest.mark.parametrize("way", [*routed.STRATEGIES])
def test_rows_beams_and_gradients(source: Any, way: str) -> None:
    model, slots = reserved()
    for name in "abc":
        slots.load(name, source[1] / name)
    rows = ["c", BASE, "a"]
    with routed.force_strategy(way), slots.rows(rows):
        close(out(model), wanted(source, rows))
        x = model.get_input_embeddings()(IDS).requires_grad_()
        model(inputs_embeds=x).logits.sum().backward()
        options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
        said = model.generate(input_ids=IDS, **options)
    z = x.detach().requires_grad_()
    source[0](inputs_embeds=z, adapter_names=rows).logits.sum().backward()
    torch.testing.assert_close(x.grad, z.grad, atol=1e-4, rtol=1e-3)
    assert torch.equal(said, source[0].generate(input_ids=IDS, adapter_names=rows, **options))


def test_beside_ordinary_adapters(source: Any) -> None:
    """A slot acts after the active adapters, and `disable_adapter` leaves both out."""
    model, slots = reserved()
    slots.load("b", source[1] / "b")
    slots.use("b")
    model.load_adapter(source[1] / "a", "a")
    model.set_adapter("a")
    source[0].set_adapter(["a", "b"])
    close(out(model), out(source[0]))
    model.merge_adapter()
    close(out(model), out(source[0]))
    model.unmerge_adapter()
    with model.disable_adapter():
        close(out(model), wanted(source, [BASE] * 3))
    slots.use(None)
    close(out(model), wanted(source, ["a"] * 3))
    close(model(input_ids=IDS, adapter_names=["a", BASE, "a"]).logits, wanted(source, ["a", BASE, "a"]))
    slots.use("b")
    model.delete_adapter("a")
    model.delete_adapter("default")
    close(out(model), wanted(source, ["b"] * 3))
    base = model.unload()
    close(out(base), wanted(source, [BASE] * 3))
    assert not any("_veneer" in m.__dict__ for m in base.modules())
    source[0].set_adapter("a")


def test_half_precision(source: Any) -> None:
    base = llama(dtype=torch.bfloat16)
    slots = reserve_slots(base, max_adapters=2, max_rank=5)
    assert slots.flat.dtype == torch.bfloat16
    full = llama()
    wide = reserve_slots(full, max_adapters=2, max_rank=5, dtype=torch.bfloat16)
    for own in (slots, wide):
        own.load("a", source[1] / "a")
        own.load("b", source[1] / "b")
    want = wanted(source, ["a", "b", BASE])
    for model, own, auto in ((base, slots, False), (full, wide, False), (full, wide, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=auto), own.rows(["a", "b", BASE]):
            assert (out(model) - want).abs().max() < 0.04 * want.abs().max()
            with own.use("a"):
                assert (out(model)[0] - want[0]).abs().max() < 0.04 * want.abs().max()


def test_state_dicts_and_refusals(source: Any) -> None:
    model, slots = reserved()
    state = veneer.load_peft_weights(str(source[1] / "b"))
    config = source[0].peft_config["b"]
    slots.load("b", state, config)
    slots.use("b")
    close(out(model), wanted(source, ["b"] * 3))
    slots.swap("b", veneer.get_peft_model_state_dict(source[0], adapter_name="a"), source[0].peft_config["a"])
    close(out(model), wanted(source, ["a"] * 3))
    with pytest.raises(TypeError, match="pass config="):
        slots.load("x", state)
    with pytest.raises(
        ValueError, match="no adapter in a slot is named 'bb'; there are 'b', did you mean 'b'|named 'bb'"
    ):
        slots.use("bb")
    with pytest.raises(ValueError, match="exists already"):
        slots.load("b", state, config)
    with pytest.raises(ValueError, match="must be a list of 1 to 256 names"):
        slots.rows([])
    with pytest.raises(ValueError, match="named 2 rows, and a layer sees 3"), slots.rows(["b", BASE]):
        out(model)
    slots.load("c", source[1] / "c")
    slots.load("d", source[1] / "c")
    with pytest.raises(ValueError, match="all 3 slots are taken, by 'b', 'c', 'd'"):
        slots.load("e", source[1] / "c")
    with pytest.raises(ValueError, match="has slots already"):
        model.reserve_slots(max_adapters=1, max_rank=1)
    with pytest.raises(ValueError, match="max_rank=0"):
        veneer.get_peft_model(llama(), veneer.LoraConfig(target_modules=["q_proj"])).reserve_slots(
            max_adapters=1, max_rank=0
        )
    before = slots.flat.clone()
    small = reserve_slots(llama(), max_adapters=1, max_rank=3, target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.v_proj: the adapter's rank is 10, and max_rank is 3"):
        small.load("c", source[1] / "c")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: this layer has no slots"):
        small.load("b", source[1] / "b")
    with pytest.raises(ValueError, match="packed for slots of another rank"):
        small.load("b", slots.pack(source[1] / "b"))
    assert not small.names and not small.flat.any()
    broken = {k: v for k, v in state.items() if "layers.0" not in k}
    with pytest.raises(veneer.AdapterLoadError, match="missing from the file"):
        slots.swap("b", broken, config)
    assert torch.equal(slots.flat, before)


@pytest.mark.parametrize("config", [
    veneer.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    veneer.LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]),
    veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    veneer.LoHaConfig(r=2, target_modules=["q_proj"]),
    veneer.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    veneer.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    veneer.BottleneckConfig(width=4),
])  # fmt: skip
def test_only_low_rank_methods_fit(config: Any, tmp_path: Path) -> None:
    model = veneer.get_peft_model(llama(), config)
    scramble(model)
    model.save_pretrained(tmp_path)
    slots = reserve_slots(llama(), max_adapters=1, max_rank=8)
    with pytest.raises(ValueError, match=r"(q_proj|lm_head|embed_tokens|layers\.).*all that a slot can hold"):
        slots.load("x", tmp_path)


def test_copies_pickles_and_casts(source: Any) -> None:
    model, slots = reserved()
    slots.load("a", source[1] / "a")
    slots.load("b", source[1] / "b")
    slots.rows(["b", "a", BASE])
    want = wanted(source, ["b", "a", BASE])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert not any("slots" in k for k in model.state_dict())
    twins = (copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model)))
    for twin in twins:
        own = slots_of(twin.runtime)
        assert own is not slots and own.names == ["a", "b"]
        close(out(twin), want)
        own.swap("b", source[1] / "c")
        close(out(twin), wanted(source, ["c", "a", BASE]))
    close(out(model), want)
    model.double()
    slots.load("c", source[1] / "c")
    slots.rows(["c", "a", "b"])
    assert slots.flat.dtype == torch.float64
    close(out(model).float(), wanted(source, ["c", "a", "b"]), 1e-4)


def test_a_packed_adapter_is_one_copy() -> None:
    base = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(24)))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=16, target_modules="all-linear"))
    scramble(model)
    state, config = veneer.get_peft_model_state_dict(model), model.peft_config["default"]
    slots = reserve_slots(
        nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(24))), max_adapters=2, max_rank=16
    )
    packed = slots.pack(state, config)
    slots.load("a", packed)
    with torch.profiler.profile() as profile:
        slots.swap("a", packed)
    copies = [e for e in profile.events() if e.name == "aten::copy_"]
    assert len(copies) == 1
    room, best = torch.empty_like(packed.values), [1.0, 1.0]
    for _ in range(30):
        for i, run in enumerate((lambda: room.copy_(packed.values), lambda: slots.swap("a", packed))):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    assert best[1] < 3 * best[0]  # a copy and some Python


# Hot swapping, by peft's names.


def loaded(source: Any, name: str, new: str) -> tuple[Any, Tensor]:
    """A fresh model with one adapter, and the outputs of another."""
    model = veneer.PeftModel.from_pretrained(llama(), source[1] / name)
    return model, wanted(source, [new] * 3)


def test_hotswap(source: Any, tmp_path: Path) -> None:
    model, want = loaded(source, "a", "b")
    held = dict(model.named_parameters())
    hotswap_adapter(model, source[1] / "b", "default")
    close(out(model), want)
    assert all(held[n] is p for n, p in model.named_parameters())
    hotswap_adapter(model, source[1] / "a", adapter_name="default", torch_device="cpu")
    close(out(model), wanted(source, ["a"] * 3))
    hotswap_adapter(model, source[1] / "b", "default")
    model.save_pretrained(tmp_path)
    close(out(veneer.PeftModel.from_pretrained(llama(), tmp_path)), want)


def test_hotswap_grows(source: Any, tmp_path: Path) -> None:
    veneer_config = veneer.LoraConfig(
        r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}
    )
    wide = veneer.get_peft_model(llama(), veneer_config).eval()
    scramble(wide, 8)
    wide.save_pretrained(tmp_path / "wide")
    model, _ = loaded(source, "b", "b")
    hotswap_adapter(model, tmp_path / "wide", "default")
    close(out(model), out(wide))
    assert model.peft_config["default"].r == 6
    model.save_pretrained(tmp_path / "saved")
    close(out(veneer.PeftModel.from_pretrained(llama(), tmp_path / "saved")), out(wide))


def test_compiled_hotswap(source: Any, tmp_path: Path) -> None:
    model, want = loaded(source, "a", "a")
    own = veneer.LoraConfig(r=4, rank_pattern={"q_proj": 2})
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=own)
    assert own.r == 6 and own.rank_pattern == {"q_proj": 6}
    close(out(model), want)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    close(out(compiled), want)
    for name in ("b", "a", "b"):
        hotswap_adapter(compiled, source[1] / name, "default")
        close(out(compiled), wanted(source, [name] * 3))
    assert counter.frame_count == 1
    model.save_pretrained(tmp_path)
    close(out(veneer.PeftModel.from_pretrained(llama(), tmp_path)), wanted(source, ["b"] * 3))
    wide = veneer.get_peft_model(llama(), veneer.LoraConfig(r=7, target_modules=["q_proj"]))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"rank is 7.*room for 6 in a compiled model.*target_rank=7"):
        hotswap_adapter(compiled, tmp_path / "wide", "default")
    with pytest.raises(ValueError, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
    with pytest.raises(ValueError, match="check_compiled='no'"):
        prepare_model_for_compiled_hotswap(model, check_compiled="no")


def test_hotswap_with_a_magnitude_and_a_copy(tmp_path: Path) -> None:
    options = {"use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = veneer.get_peft_model(llama(), veneer.LoraConfig(r=4, **options)).eval()
    other = veneer.get_peft_model(llama(), veneer.LoraConfig(r=2, lora_alpha=20, **options)).eval()
    scramble(model)
    scramble(other, 5)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    close(out(model), out(other))


def test_hotswap_refuses(source: Any, tmp_path: Path) -> None:
    model, _ = loaded(source, "b", "b")
    before = out(model)
    with pytest.raises(RuntimeError, match="have no place in adapter 'default'"):
        hotswap_adapter(model, source[1] / "a", "default")
    with pytest.raises(ValueError, match="no adapter is named 'defalt'"):
        hotswap_adapter(model, source[1] / "b", "defalt")
    for name, config in {
        "dora": veneer.LoraConfig(use_dora=True, target_modules=["q_proj"]),
        "ia3": veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "dropout": veneer.LoraConfig(lora_dropout=0.1, target_modules=["q_proj"]),
    }.items():
        veneer.get_peft_model(llama(), config).save_pretrained(tmp_path / name)
        with pytest.raises(
            ValueError, match="only LoRA can be swapped|use_dora is False here|lora_dropout is 0.0 here"
        ):
            hotswap_adapter(model, tmp_path / name, "default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base weights"):
        hotswap_adapter(model, source[1] / "b", "default")
    model.unmerge_adapter()
    close(out(model), before)
    with pytest.raises(ValueError, match="has no LoRA adapter"):
        prepare_model_for_compiled_hotswap(
            veneer.get_peft_model(llama(), veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
            target_rank=4,
        )
    with pytest.raises(ValueError, match="rank 3 there, above target_rank=2"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
