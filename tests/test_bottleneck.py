"""Bottleneck adapters, fusion and composition on real architectures."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import veneer
from models import IDS, MODELS
from small import deviation
from veneer.targets import blocks

KINDS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"width": 6},
    "houlsby": {"kind": "houlsby", "width": 6},
    "parallel": {"kind": "parallel", "width": 6, "scaling": "learned"},
    "compacter": {"kind": "compacter", "width": 8},
    "plus": {"width": 6, "original_ln_after": False, "residual_before_ln": False, "scaling": "channel"},
}
NAMES = [n for n in MODELS if n not in ("llama_tied", "mt5", "qwen3_moe")]
every = pytest.mark.parametrize("name", NAMES)
kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def scramble(model: nn.Module, seed: int = 1, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def adapted(name: str, kind: str = "pfeiffer", *, scrambled: bool = True, **options: Any) -> Any:
    config = veneer.BottleneckConfig(**{**KINDS[kind], "activation": "gelu", **options})
    model = veneer.get_peft_model(MODELS[name].make(), config).eval()
    if scrambled:
        scramble(model)
    return model


def logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**MODELS[name].inputs()).logits


@every
@kinds
def test_identity_then_trained_by_exactly_its_parameters(name: str, kind: str) -> None:
    expected = logits(MODELS[name].make(), name)
    model = adapted(name, kind, scrambled=False)
    assert deviation(logits(model, name), expected) <= 1e-6
    scramble(model)
    assert (logits(model, name) - expected).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model, name), expected)
    model(**MODELS[name].inputs()).loss.backward()
    trained = {id(p) for p in model.runtime.parameters("default")}
    for n, p in model.named_parameters():
        assert p.requires_grad == (id(p) in trained)
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == p.requires_grad, n
    assert torch.equal(logits(model.unload(), name), expected)


@every
def test_houlsby_by_hand(name: str) -> None:
    """h + W_up gelu(W_down h) at every sub-layer, done with hooks on another model."""
    model = adapted(name, "houlsby")
    other = MODELS[name].make()
    tensors = dict(model.named_parameters())
    spots = blocks.find_sublayers(other)
    assert {s.role for s in spots} >= {"attention", "feed_forward"}
    for spot in spots:
        at = f"base_model.model.{spot.name}.adapter_"
        p = [tensors[f"{at}{k}:default"] for k in ("down", "down_bias", "up", "up_bias")]

        def hook(module: Any, args: Any, y: Any, p: Any = p) -> Any:
            h = y[0] if isinstance(y, tuple) else y
            h = h + nn.functional.linear(nn.functional.gelu(nn.functional.linear(h, *p[:2])), *p[2:])
            return (h, *y[1:]) if isinstance(y, tuple) else h

        other.get_submodule(spot.name).register_forward_hook(hook)
    assert deviation(logits(other, name), logits(model, name)) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "bart", "llama", "t5", "gpt2", "whisper"])
@pytest.mark.parametrize("kind", ["pfeiffer", "parallel", "plus", "compacter"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, kind: str, reentrant: bool) -> None:
    plain, other = adapted(name, kind).train(), adapted(name, kind).train()
    other.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.get_base_model().enable_input_require_grads()
    for model in (plain, other):
        model(**MODELS[name].inputs()).loss.backward()
    pairs = zip(plain.runtime.parameters("default"), other.runtime.parameters("default"), strict=True)
    assert all((a.grad - b.grad).abs().max() <= 1e-5 * max(1, float(a.grad.abs().max())) for a, b in pairs)


# transformers' GPT-2 itself does not compile whole with labels: its loss logs a warning.
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "opt"])
@pytest.mark.parametrize("kind", ["pfeiffer", "parallel", "plus", "compacter"])
def test_compile_without_graph_breaks(name: str, kind: str) -> None:
    model = adapted(name, kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**{k: v for k, v in MODELS[name].inputs().items() if k != "use_cache"}).logits
    assert deviation(found, logits(model, name)) <= 1e-4


@every
def test_save_load_copy_pickle(name: str, tmp_path: Any) -> None:
    model = adapted(name, "compacter", original_ln_before=True)
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(MODELS[name].make(), tmp_path)
    assert torch.equal(logits(again, name), expected)
    assert not any(p.requires_grad for p in again.parameters())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, name), expected)
        scramble(other, 2)
        assert not torch.equal(logits(other, name), expected)
        assert torch.equal(logits(model, name), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "whisper"])
def test_generation_equals_one_pass(name: str) -> None:
    model = adapted(name, "pfeiffer", places=["attention", "cross_attention", "feed_forward"])
    x = {k: v for k, v in MODELS[name].inputs().items() if k != "labels"}
    with torch.no_grad():
        made = model.generate(**x, max_new_tokens=4, do_sample=False)
        slow = model.generate(**x, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, slow)


def test_threads_do_not_see_each_other() -> None:
    model = adapted("llama", "parallel")
    batches = [{"input_ids": (IDS + i) % 60} for i in range(4)]
    with torch.no_grad():
        expected = [model(**b).logits for b in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            same = [torch.equal(model(**batches[i]).logits, expected[i]) for _ in range(20)]
        wrong.extend([i] * same.count(False))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [x.start() for x in threads]
    [x.join() for x in threads]
    assert not wrong


def test_nothing_is_kept_between_calls() -> None:
    model = adapted("llama", "parallel")
    model(**MODELS["llama"].inputs())
    assert all(s.tap.value is None for s in model.runtime.sites.values())


# Places.


def stream(model: nn.Module, x: dict[str, Any]) -> list[float]:
    """How far each place's r + h is from what its norm gets, or from the r of one of the next places."""
    spots, seen = blocks.find_sublayers(model), {}
    modules = dict(model.named_modules())

    def enters(name: str) -> Any:
        return lambda m, args, kwargs: seen.__setitem__(
            ("in", name), (args[0] if args else next(iter(kwargs.values()))).clone()
        )

    def leaves(name: str) -> Any:
        return lambda m, args, y: seen.__setitem__(("out", name), (y[0] if isinstance(y, tuple) else y).clone())

    for spot in spots:
        for name in {spot.residual, spot.norm} - {""}:
            modules[name].register_forward_pre_hook(enters(name), with_kwargs=True)
        modules[spot.name].register_forward_hook(leaves(spot.name))
    with torch.no_grad():
        model.eval()(**x)
    apart = []
    for i, spot in enumerate(spots):
        total = seen["in", spot.residual] + seen["out", spot.name]
        if spot.norm:
            apart.append(float((seen["in", spot.norm] - total).abs().max()))
        elif i + 1 < len(spots) and spots[i + 1].residual.split(".")[0] == spot.residual.split(".")[0]:
            apart.append(float((seen["in", spots[i + 1].residual] - total).abs().max()))
    return apart


CAUSAL = {
    "Llama": {}, "Gemma2": {"head_dim": 8, "num_key_value_heads": 1}, "Olmo2": {}, "Bloom": {}, "BioGpt": {}, "GPT2": {},
    "GPTNeo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "XGLM": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
    "GPTNeoX": {"use_parallel_residual": False},
}  # fmt: skip
ENCODERS = {
    "Albert": {"embedding_size": 16}, "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, "Bert": {},
    "DebertaV2": {}, "Electra": {"embedding_size": 16}, "ModernBert": {}, "Nystromformer": {}, "Camembert": {}, "Roberta": {},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_the_places_found_are_those_of_the_residual_stream(name: str) -> None:
    options = {**SIZES, **CAUSAL.get(name, {}), **ENCODERS.get(name, {})}
    if name == "GPT2":
        options |= {"n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    auto = t.AutoModelForCausalLM if name in CAUSAL else t.AutoModel
    model = auto.from_config(getattr(t, f"{name}Config")(**options))
    apart = stream(model, {"input_ids": IDS[:, :6] % 36 + 3})
    assert len(apart) >= 2
    assert max(apart) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "vit", "mixtral", "bart"])
def test_reading_a_block_agrees_with_the_table(name: str) -> None:
    model = MODELS[name].make()
    modules = dict(model.named_modules())
    compared = 0
    for n, stack in modules.items():
        if isinstance(stack, nn.ModuleList):
            kind, config = blocks.nearest_config(modules, n)
            for block in stack:
                assert blocks.roles_of(block, kind, config) == blocks.read_roles(block)
                compared += bool(blocks.read_roles(block))
    assert compared


def test_opt_says_where_it_normalises() -> None:
    for before in (True, False):
        config = t.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=before)
        assert all(bool(s.norm) != before for s in blocks.find_sublayers(t.AutoModelForCausalLM.from_config(config)))


class Odd(nn.Module):
    """No transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def test_named_places_on_any_module() -> None:
    x = torch.randn(2, 3, 8)
    model = veneer.get_peft_model(Odd(), veneer.BottleneckConfig(target_modules=["second"], width=2))
    assert [s.key for s in model.runtime.sites.values()] == ["second"]
    expected = Odd.forward(model.get_base_model(), x)
    assert torch.equal(model(x), expected)  # identity at the start
    model = veneer.get_peft_model(MODELS["llama"].make(), veneer.BottleneckConfig(target_modules=r".*layers\.1\.mlp"))
    (site,) = model.runtime.sites.values()
    assert site.spot.role == "feed_forward" and site.spot.residual.endswith("post_attention_layernorm")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapter" not in n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Odd has no transformer blocks that are understood; name the modules"),
        ({"target_modules": ["frist"]}, r"matches no module; did you mean 'first'"),
        ({"target_modules": ["first"], "exclude_modules": ["first"]}, "nothing is left of 1 places"),
        ({"target_modules": ["first"], "residual_before_ln": "post_add"}, "residual stream is not known here"),
        ({"target_modules": ["first"], "kind": "compacter", "width": 3}, r"phm_dim=4\): must divide"),
        ({"target_modules": ["first"], "width": {"4": 2}}, "says nothing of block -1"),
    ],
)
def test_refusals_change_nothing(options: dict[str, Any], message: str) -> None:
    model = Odd()
    with pytest.raises(ValueError, match=message):
        veneer.get_peft_model(model, veneer.BottleneckConfig(**options))
    assert type(model.first) is nn.Linear and all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "veneer_shared")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fancy"}, "kind='fancy'.*must be one of 'pfeiffer'"),
        ({"activation": "gelo"}, "did you mean 'gelu'"),
        ({"width": 4, "reduction_factor": 2}, "both say the width"),
        ({"width": 0}, "width=0"),
        ({"reduction_factor": {"1": -1}}, "reduction_factor=-1"),
        ({"scaling": "huge"}, "must be one of 'learned', 'channel'"),
        ({"places": ["head"]}, "must be one of 'attention'"),
        ({"kind": "houlsby", "residual_before_ln": "post_add"}, "needs original_ln_before=True"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"layer_norm": "inside"}, "layer_norm='inside'"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        veneer.BottleneckConfig(**options)


def test_width_by_block_and_blocks_left_out() -> None:
    model = adapted("llama", width=None, reduction_factor={"0": 4, "default": 8})
    assert [s.owner._parameters["adapter_down:default"].shape[0] for s in model.runtime.sites.values()] == [8, 4]
    model = adapted("t5", leave_out=[0, 3])
    assert [s.spot.layer for s in model.runtime.sites.values()] == [1, 2]


def test_shared_tensors_are_trained_once_and_dropped() -> None:
    model = adapted("bert", "compacter", phm_shared_weights=True)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "veneer_shared" in n]
    assert len(names) == 5  # the rule and two factors of two matrices
    own = [n for n, p in model.named_parameters() if p.requires_grad and "veneer_shared" not in n]
    assert {n.rpartition(".")[2] for n in own} == {"adapter_down_bias:default", "adapter_up_bias:default"}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.runtime.parameters("default")) == trained
    before = dict(model.named_parameters())[names[0]].detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**MODELS["bert"].inputs()).loss.backward()
    optimizer.step()
    assert not torch.equal(dict(model.named_parameters())[names[0]], before)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("veneer_shared" in n for n, _ in model.unload().named_parameters())


def test_half_precision_bases_get_float32_adapters() -> None:
    base = MODELS["bert"].make().to(torch.bfloat16)
    model = veneer.get_peft_model(base, veneer.BottleneckConfig(kind="compacter", width=8))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**MODELS["bert"].inputs()).logits.dtype == torch.bfloat16


def test_with_lora_on_the_same_layers() -> None:
    model = adapted("llama", target_modules=["mlp", "o_proj"])
    bottleneck = logits(model, "llama")
    model.add_adapter("lora", veneer.LoraConfig(target_modules=["o_proj", "down_proj"], init_lora_weights=False))
    model.set_adapter(["lora", "default"])
    assert (logits(model, "llama") - bottleneck).abs().max() > 1e-4
    model.delete_adapter("lora")
    assert torch.equal(logits(model, "llama"), bottleneck)


def test_it_learns() -> None:
    """Which half of the vocabulary a sequence is from, through adapters and a new head."""
    torch.manual_seed(0)
    model = veneer.get_peft_model(MODELS["bert"].make(), veneer.BottleneckConfig(task_type="SEQ_CLS", width=8))
    labels = torch.arange(64) % 2
    ids = torch.randint(4, 34, (64, 8)) + 30 * labels[:, None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(input_ids=ids).logits.argmax(-1) == labels).float().mean() >= 0.95


# Fusion and composition.


def fused(name: str = "bert", kind: str = "pfeiffer", **options: Any) -> Any:
    model = adapted(name, kind)
    model.add_adapter("second", veneer.BottleneckConfig(**{**KINDS[kind], "width": 8, "activation": "tanh"}))
    scramble(model, 4)
    model.add_adapter("fusion", veneer.AdapterFusionConfig(adapter_names=["default", "second"], **options))
    model.set_adapter("fusion")
    return model


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_fusion_by_hand(name: str) -> None:
    """A fusion without maps, whose scores follow from dot products alone, on one place."""
    model = fused(name, "houlsby")
    scramble(model, 5)
    with torch.no_grad():
        sites = [s for s in model.runtime.sites.values() if "fusion" in s.entries]
        assert len(sites) == len(blocks.find_sublayers(MODELS[name].make()))
        site = sites[0]
        h = torch.randn(2, 3, 32)
        p = site.tensors("fusion")
        x = {"first": h, site.spot.residual: torch.randn(2, 3, 32)}
        found = site.entries["fusion"].method.post(p, site, x, h)
        ups = []
        for n in ("default", "second"):
            q = site.tensors(n)
            act = torch.tanh if n == "second" else nn.functional.gelu
            ups.append(act(h @ q["down"].T + q["down_bias"]) @ q["up"].T + q["up_bias"])
        u = torch.stack(ups, 2)
        scores = ((h @ p["query"].T + p["query_bias"])[:, :, None] * (u @ p["key"].T + p["key_bias"])).sum(-1)
        expected = (scores.softmax(-1)[..., None] * (u @ p["value"].T)).sum(2) + h
        assert deviation(found, expected) <= 1e-4


def test_fusion_trains_itself_alone_and_is_saved(tmp_path: Any) -> None:
    model = fused()
    scramble(model, 6, 0.05)
    model(**MODELS["bert"].inputs()).loss.backward()
    for n, p in model.named_parameters():
        if "fusion" in n:  # a bias of all keys is lost in the softmax
            assert p.grad.abs().sum() > 0 or "key_bias" in n, n
        else:
            assert p.grad is None, n
    expected = logits(model, "bert")
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(MODELS["bert"].make(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    again.load_adapter(tmp_path / "fusion", "fusion")
    again.set_adapter("fusion")
    assert torch.equal(logits(again.eval(), "bert"), expected)
    with pytest.raises(ValueError, match="'second' is used by 'fusion'"):
        model.delete_adapter("second")
    plain = logits(MODELS["bert"].make(), "bert")
    assert torch.equal(logits(model.unload(), "bert"), plain)


def test_fusion_reaches_the_adapters_if_told_and_compiles_and_copies() -> None:
    model = fused("llama", train_adapters=True)
    model(**MODELS["llama"].inputs()).loss.backward()
    assert all(p.grad is not None for p in model.runtime.parameters("second"))
    expected = logits(model, "llama")
    assert torch.equal(logits(copy.deepcopy(model), "llama"), expected)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**MODELS["llama"].inputs()).logits
    assert deviation(found, expected) <= 1e-5
    penalty = veneer.files.adapterhub.fusion_regularization(model, "fusion")
    assert 0 <= penalty.item() < 1e-6  # starts at the identity
    scramble(model, 7)
    assert veneer.files.adapterhub.fusion_regularization(model, "fusion").requires_grad


def test_fusions_that_make_no_sense() -> None:
    model = adapted("bert")
    model.add_adapter("lora", veneer.LoraConfig(target_modules=["query"]))
    model.add_adapter("two", veneer.BottleneckConfig(kind="houlsby", width=4))
    model.add_adapter("side", veneer.BottleneckConfig(kind="parallel", width=4))
    for names, message in (
        (["default"], "name two adapters or more"),
        (["default", "lora"], "'lora' is no sequential bottleneck adapter"),
        (["default", "side"], "'side' is no sequential bottleneck adapter"),
        (["default", "two"], "at different places, such as"),
        (["default", "nobody"], "no adapter is named 'nobody'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter("fusion", veneer.AdapterFusionConfig(adapter_names=names))
    with pytest.raises(ValueError, match="list of different names"):
        veneer.AdapterFusionConfig(adapter_names=["a", "a"])


def test_side_by_side_on_a_model() -> None:
    model = fused("llama")
    model.add_adapter("lora", veneer.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    names = ["default", "second", "lora"]
    model.set_adapter([veneer.Average(*names, weights=[1, 0, 0])])
    one = logits(model, "llama")
    assert model.active_adapters == names
    model.set_adapter(veneer.Parallel("default", "fusion"))
    with model.use_adapter(veneer.Parallel("default", "second")):
        assert (logits(model, "llama") - one).abs().max() > 1e-4
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, "llama"), logits(model, "llama"))
    with torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**MODELS["llama"].inputs()).logits
    assert deviation(found, logits(model, "llama")) <= 1e-5
    model.delete_adapter("fusion")
    assert model.active_adapters == ["default"]


def test_compositions_that_make_no_sense() -> None:
    model = fused("bert")
    before = model.active_adapters
    for chosen, error, message in (
        (lambda: veneer.Parallel("a"), ValueError, "two adapters or more"),
        (lambda: veneer.Parallel("a", ["b", "a"]), ValueError, "'a' is named twice"),
        (lambda: veneer.Average("a", "b", weights=[1]), ValueError, "must be 2 numbers"),
        (lambda: veneer.Average("a", "b", weights=[1, -1]), ValueError, "must be 2 numbers"),
        (lambda: veneer.Parallel("a", 3), TypeError, "name an adapter"),
        (lambda: model.set_adapter(veneer.Parallel("default", "nobody")), ValueError, "no adapter is named 'nobody'"),
        (lambda: model.set_adapter(3), TypeError, "name an adapter"),
    ):
        with pytest.raises(error, match=message):
            chosen()
    assert model.active_adapters == before
