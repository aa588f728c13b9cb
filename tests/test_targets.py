"""Which modules and parameters a config adapts: as in peft, and where on purpose not."""

from __future__ import annotations

import copy
import enum
import functools
import re
import time
import warnings
from types import SimpleNamespace
from typing import Any

import peft
import peft.utils.constants as known
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen2MoeConfig

from models import MODELS, SIZES
from small import llama
from veneer import layers
from veneer.targets import defaults, select
from veneer.targets.query import TargetQuery

FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "modules_to_save")
NAMES = st.lists(st.sampled_from(["layers", "0", "1", "q_proj", "proj", "self_attn", "mlp"]), min_size=1, max_size=5)
SUFFIXES = st.lists(NAMES.map(lambda n: ".".join(n[:2])), min_size=1, max_size=3)


def config(**options: Any) -> Any:
    """What peft reads."""
    return SimpleNamespace(**dict.fromkeys(FIELDS) | {"target_modules": None, "peft_type": "LORA"} | options)


def query(**options: Any) -> TargetQuery:
    return TargetQuery(**{"peft_type": "LORA"} | options)


def found(model: nn.Module, skip: Any = frozenset(), **options: Any) -> select.Targets:
    return select.resolve_targets(model, query(**options), supported=layers.is_supported, skip=skip)


def resolve(model: nn.Module, **options: Any) -> list[str]:
    return found(model, **options).modules


# What is chosen, on whole models.


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)))


def two_towers() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return nn.ModuleDict({"a": transformers.GPT2Model(config), "b": transformers.GPT2Model(config)})


def mnli() -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, intermediate_size=48))


MAKE = {name: architecture.make for name, architecture in MODELS.items()} | {
    "sequential": sequential, "two_towers": two_towers, "roberta": mnli,
}  # fmt: skip
MODERN = ["llama", "opt", "whisper", "vit", "mixtral", "qwen3_moe", "gpt_oss"]
LEAVES = dict.fromkeys(MODERN, ["q_proj", "v_proj"]) | {
    "gpt2": ["c_attn", "c_proj"], "t5": ["q", "wo"], "mt5": ["v", "wi_1"], "bert": ["query", "dense"],
    "roberta": ["query", "dense"], "two_towers": ["c_attn"], "sequential": ["0"],
}  # fmt: skip
LISTS = {"gpt2": "h", "two_towers": "h", "t5": "block", "mt5": "block", "bert": "layer", "roberta": "layer"}
DOTTED = {
    "gpt2": ["mlp.c_proj", "attn.c_attn"],
    "t5": ["SelfAttention.q"],
    "bert": ["output.dense"],
    "llama": ["mlp.up_proj"],
}
FUSED = ("mixtral", "qwen3_moe")
EXPERTS = [["mlp.experts.gate_up_proj"], ["experts.down_proj"], ["gate_up_proj", "down_proj"]]


@functools.cache
def base(name: str) -> nn.Module:
    return MAKE[name]()


def chosen_by_peft(model: nn.Module, **options: Any) -> set[str] | None:
    """Names of the modules and parameters that peft wraps, or None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=1, **options))
        except ValueError:
            return None
    names = set()
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):  # wrappers of several parameters of one module are nested
            names.add(f"{name.replace('.base_layer', '')}.{module.parameter_name}")
        elif isinstance(module, BaseTunerLayer):
            names.add(name)
    return names


def cases() -> list[Any]:
    made = []

    def add(name: str, label: str, **options: Any) -> None:
        made.append(pytest.param(name, options, id=f"{name}-{label}"))

    for name, leaves in LEAVES.items():
        inner = "|".join(leaves)
        add(name, "suffixes", target_modules=leaves)
        add(name, "regex", target_modules=rf".*\.({inner})" if name != "sequential" else r"0|2\.1")
        if name not in FUSED:
            add(name, "all-linear", target_modules="all-linear")
            add(name, "ALL-LINEAR", target_modules="ALL-Linear")
            add(
                name,
                "exclude",
                target_modules="all-linear",
                exclude_modules=leaves if name != "sequential" else ["2.0"],
            )
            add(
                name,
                "copies",
                target_modules="all-linear",
                modules_to_save=leaves[:1] if name != "sequential" else ["2"],
            )
        add(name, "exclude-list", target_modules=leaves, exclude_modules=[*leaves[1:], "2.0"])
        if name == "sequential":
            continue
        every = leaves if name in FUSED else "all-linear"
        add(name, "exclude-regex", target_modules=every, exclude_modules=rf".*\b{leaves[0]}")
        add(name, "layer", target_modules=leaves, layers_to_transform=0)
        add(name, "no-layers", target_modules=leaves, layers_to_transform=[])
        add(name, "layers", target_modules=leaves, layers_to_transform=[0], layers_pattern=LISTS.get(name, "layers"))
        add(
            name,
            "patterns",
            target_modules=leaves,
            layers_to_transform=[0],
            layers_pattern=["no", LISTS.get(name, "layers")],
        )
    for name, suffixes in DOTTED.items():
        add(name, "dotted", target_modules=suffixes)
        add(name, "dotted-layer", target_modules=suffixes, layers_to_transform=[1])
    for name in ("llama", "gpt2", "t5", "mt5", "bert", "roberta", "opt"):
        add(name, "defaults", target_modules=None)
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        for i, parameters in enumerate(EXPERTS):
            add(name, f"parameters{i}", target_modules=[], target_parameters=parameters)
        add(name, "both", target_modules=["q_proj"], target_parameters=EXPERTS[0])
    add(
        "llama",
        "full-name-beats-layers",
        target_modules=["model.layers.1.mlp.up_proj", "q_proj"],
        layers_to_transform=[0],
    )
    add("llama", "parameters-of-linear", target_modules=[], target_parameters=["q_proj.weight"])
    add("llama", "parameters-and-defaults", target_modules=None, target_parameters=["up_proj.weight"])
    add("qwen3_moe", "parameters-no-defaults", target_modules=None, target_parameters=EXPERTS[1])
    add("gpt_oss", "parameters-no-defaults", target_modules=None, target_parameters=EXPERTS[1])
    add("llama_tied", "tied-parameter", target_modules=[], target_parameters=["lm_head.weight"])
    add("bert", "head", target_modules="all-linear", task_type="SEQ_CLS")
    add("roberta", "head", target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    return made


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "options"), cases())
def test_the_same_is_chosen_as_in_peft(name: str, options: dict[str, Any]) -> None:
    theirs = chosen_by_peft(base(name), **options)
    ours = found(base(name), **options)
    assert theirs is not None
    assert {*ours.modules, *ours.parameters} == theirs
    order = {n: i for i, (n, _) in enumerate(base(name).named_modules())}
    assert ours.modules == sorted(ours.modules, key=order.__getitem__)


class Tree(nn.Module):
    """A model with modules of given names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            at: nn.Module = self
            for part in name.split("."):
                if part not in at._modules:
                    at.add_module(part, nn.Identity())
                at = at.get_submodule(part)


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(NAMES.map(".".join), min_size=1, max_size=6),
    spec=SUFFIXES,
    exclude=st.none() | SUFFIXES | st.sampled_from([r".*\.0\..*", "mlp.*"]),
    chosen=st.none() | st.integers(0, 1) | st.lists(st.integers(0, 1), max_size=2),
    pattern=st.sampled_from([None, "layers", ["mlp", "layers"], "l.*s"]),
    copies=st.none() | st.lists(st.sampled_from(["mlp", "q_proj", "self_attn"]), min_size=1, max_size=2),
)
def test_any_choice_is_pefts(names: Any, spec: Any, exclude: Any, chosen: Any, pattern: Any, copies: Any) -> None:
    """Where Veneer chooses, it chooses what peft does; it refuses more: what matches nothing, and absent layers."""
    pattern = pattern if chosen is not None else None
    model = Tree(names)
    options = dict(zip(FIELDS, (exclude, chosen, pattern, None, copies), strict=True)) | {"target_modules": set(spec)}
    theirs = [n for n, _ in model.named_modules() if n and check_target_module_exists(config(**options), n)]
    ours, refused = None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ours = select.resolve_targets(model, query(**options), supported=lambda _: True).modules
        except ValueError as error:
            refused = str(error)
    leading = chosen is not None and pattern is None  # layers that stand first in the name: peft finds none of them
    if theirs and ours is None:
        assert "layers_to_transform" in refused
    elif ours is not None:
        # What peft does find then are names in full, which need no layer.
        assert ours == theirs or (leading and set(theirs) <= set(ours) & set(spec))


@given(NAMES.map(".".join), SUFFIXES)
def test_suffixes_match_as_in_peft(key: str, spec: list[str]) -> None:
    theirs = check_target_module_exists(config(target_modules=set(spec)), key)
    assert select.matches(key, set(spec)) == select.matches(key, spec) == bool(theirs)
    assert select.with_suffixes([key], set(spec))[0] == [key] * bool(theirs)


@given(NAMES.map(".".join), st.sampled_from([r".*proj", r"layers\.\d\..*", r".*\.(q_proj|mlp)", "mlp"]))
def test_expressions_match_as_in_peft(key: str, spec: str) -> None:
    assert select.matches(key, spec) == bool(check_target_module_exists(config(target_modules=spec), key))


@given(NAMES.map(".".join), st.lists(NAMES.map(".".join) | st.sampled_from([r"layers\.\d.*", "q|proj"]), max_size=4))
def test_pattern_values_are_pefts(key: str, patterns: list[str]) -> None:
    table = {p: i for i, p in enumerate(patterns)}
    assert defaults.pattern_value(table, key, -1) == table.get(get_pattern_key(list(table), key), -1)


def test_no_spec_matches_nothing() -> None:
    assert not select.matches("a.b", None)
    assert not select.matches("a.b", [])
    with pytest.raises(ValueError, match=r"pattern='\(' is no valid regular expression"):
        defaults.pattern_value({"(": 1}, "a", 0)


# Defaults.


def pefts_tables() -> dict[str, dict[str, Any]]:
    """By peft_type, what peft's tuner looks defaults up in."""
    found = {t.value: getattr(tuner, "target_module_mapping", None) for t, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    found["IA3"] = known.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING  # not an attribute of its tuner
    return {method: table for method, table in found.items() if table}


@pytest.mark.parametrize("method", sorted(pefts_tables()))
def test_defaults_are_pefts(method: str) -> None:
    ours = defaults.defaults_of(method.lower(), more=False)
    assert {k: v for k, v in ours.items() if k != "*"} == pefts_tables()[method]
    for architecture, modules in pefts_tables()[method].items():  # what Veneer adds does not stand in front of them
        assert defaults.default_targets(method, architecture) == modules


def test_no_default_is_missing() -> None:
    pattern = re.compile(r"TRANSFORMERS_MODELS_TO_\w+_TARGET_MODULES_MAPPING")
    everything = [getattr(known, n) for n in dir(known) if pattern.fullmatch(n)]
    assert len(everything) == len(pefts_tables()) == 35
    assert {id(t) for t in everything} == {id(t) for t in pefts_tables().values()}
    assert set(defaults.defaults()) - {"more", "ia3_feedforward"} == {m.lower() for m in pefts_tables()}
    feedforward = known.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert defaults.defaults_of("ia3_feedforward", more=False) == feedforward
    assert all(defaults.default_feedforward(a) == modules for a, modules in feedforward.items())


def test_default_targets() -> None:
    assert defaults.default_targets("LORA", "mt5") == ["q", "v"]
    assert defaults.default_targets("LORA", "no_such") is defaults.default_targets("LORA", None) is None
    assert defaults.default_targets("NO_SUCH", "llama") is defaults.default_feedforward(None) is None
    assert defaults.default_targets("OSF", "no_such") == "all-linear"  # as in peft, also without a model_type
    defaults.default_targets("LORA", "mt5").append("k")  # a copy
    assert defaults.default_targets("LORA", "mt5") == ["q", "v"]
    assert defaults.default_targets("PVERA", "vit") == ["q_proj", "v_proj"]  # added, through two others
    assert defaults.default_targets("VERA", "vit", more=False) is None


OWN = sorted(defaults.defaults()["more"]["lora"])


@pytest.mark.parametrize("architecture", OWN)
def test_defaults_that_peft_lacks_name_real_modules(architecture: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(architecture))
    assert found(model).source == f"defaults for {architecture}"
    names = [n for n, _ in model.named_modules()]
    for entry in defaults.defaults()["more"]["ia3"].get(architecture, []):
        assert any(select.matches(n, {entry}) for n in names), entry
    assert set(defaults.default_feedforward(architecture) or []) <= set(
        defaults.default_targets("IA3", architecture) or []
    )


def test_model_type() -> None:
    model = nn.Linear(1, 1)
    assert defaults.model_type(model) is None
    model.config = {"model_type": "llama"}
    assert defaults.model_type(model) == "llama"
    model.config = SimpleNamespace()
    assert defaults.model_type(model) is None
    assert defaults.model_type(llama()) == "llama"


def test_peft_type_may_be_an_enumeration() -> None:
    class Kind(enum.Enum):
        IA3 = "IA3"

    chosen = {n.rpartition(".")[2] for n in resolve(llama(), peft_type=Kind.IA3)}
    assert chosen == {"k_proj", "v_proj", "down_proj"}


# "all-linear", where Veneer differs from peft on purpose: routers and projections that are never called.


def test_all_linear_leaves_out_heads_and_routers() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(num_hidden_layers=1))
    chosen = resolve(model, target_modules="all-linear")
    assert "lm_head" not in chosen
    assert not [n for n in chosen if n.endswith(("shared_expert_gate", ".gate"))]
    assert any(n.endswith("shared_expert.gate_proj") for n in chosen)
    assert chosen_by_peft(model, target_modules="all-linear") - set(chosen) == {"model.layers.0.mlp.shared_expert_gate"}


@pytest.mark.parametrize("name", FUSED)
def test_all_linear_means_layers_only(name: str) -> None:
    """For LoRA on some mixtures of experts, peft also takes the fused experts, at twice the rank, and the router: they
    were linear layers in transformers 4. Here they are named, as they are in the files that peft writes for them.
    """
    ours = set(resolve(base(name), target_modules="all-linear"))
    theirs = chosen_by_peft(base(name), target_modules="all-linear")
    assert ours < theirs
    assert {n.split(".", 3)[3] for n in theirs - ours} == {"mlp.gate.weight", *EXPERTS[0], "mlp.experts.down_proj"}
    named = ["gate.weight", "gate_up_proj", "down_proj"]
    also = found(base(name), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=named)
    assert {*also.modules, *also.parameters} == theirs


def test_mixtral_has_a_default() -> None:
    """The same rule of peft empties the default of its own table, and attaching fails."""
    assert len(resolve(base("mixtral"))) == 4
    assert chosen_by_peft(base("mixtral")) is None


def test_all_linear_knows_routers_by_their_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sequential(nn.Linear(4, 2))
            self.router = nn.Linear(4, 2)
            self.gate_proj = nn.Linear(4, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    assert resolve(nn.Sequential(Block()), target_modules="all-linear") == ["0.gate_proj", "0.experts.0"]
    assert resolve(Block(), target_modules="all-linear") == ["gate_proj", "experts.0"]
    assert resolve(Block(), target_modules=["router", "gate.0"]) == ["gate.0", "router"]  # when named, they are meant
    plain = nn.ModuleDict({"gate": nn.Linear(4, 4), "router": nn.Linear(4, 4)})  # no experts: no routers
    assert resolve(plain, target_modules="all-linear") == ["gate", "router"]


@pytest.mark.parametrize(
    "architecture", ["zaya", "jetmoe", "afmoe", "llama4_text", "switch_transformers", "longcat_flash"]
)
def test_all_linear_leaves_out_the_routers_of(architecture: str) -> None:
    made = AutoConfig.for_model(architecture)
    made.num_hidden_layers = made.num_layers = 4
    with torch.device("meta"):
        model = AutoModel.from_config(made)
    theirs = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    left_out = {re.sub(r"\d+", "0", n) for n in theirs - set(resolve(model, target_modules="all-linear"))}
    assert left_out
    assert all(re.search(r"\.(router(\..*)?|mlp\.gate\..*)$", n) for n in left_out)


def test_all_linear_passes_over_what_cannot_be_adapted() -> None:
    class QuantLinear(nn.Module):
        """As the quantization libraries have them: linear by name only."""

    attention = nn.MultiheadAttention(4, 2)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": QuantLinear(), "d": attention})
    assert resolve(model, target_modules="all-linear") == ["a", "b"]
    assert resolve(model, target_modules=["out_proj"]) == ["d.out_proj"]
    options = {"supported": lambda m: m is not model["b"]}
    assert select.resolve_targets(model, query(target_modules="all-linear"), **options).modules == ["a", "c"]
    with pytest.raises(
        ValueError, match=r"matches 'b', a Linear, which cannot be adapted; allowed are .* modules_to_save"
    ):
        select.resolve_targets(model, query(target_modules=["a", "b"]), **options)
    with pytest.raises(ValueError, match="no linear layer that can be adapted; names in this model: none"):
        resolve(nn.Sequential(nn.ReLU()), target_modules="all-linear")


# Layers, exclusion, what is skipped.


def test_layers() -> None:
    model = llama(3)
    spec = {"target_modules": ["q_proj"]}
    assert resolve(model, **spec, layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
    assert len(resolve(model, **spec, layers_to_transform=[0, 2], layers_pattern="layers")) == 2
    with pytest.raises(ValueError, match=r"no layer \[7\].*layers are 0 to 2"):
        resolve(model, **spec, layers_to_transform=[1, 7])  # peft takes layer 1 and says nothing
    with pytest.raises(ValueError, match=r"no layer \[-1\]"):
        resolve(model, **spec, layers_to_transform=-1)
    with pytest.raises(
        ValueError, match=r"no layer \[0\].*layers are none \(layers_pattern='block', first target 'model"
    ):
        resolve(model, **spec, layers_to_transform=[0], layers_pattern="block")
    with pytest.raises(ValueError, match=r"layers_pattern='\(' is no valid regular expression"):
        resolve(model, **spec, layers_to_transform=[0], layers_pattern="(")
    with pytest.raises(ValueError, match="needs layers_to_transform"):
        resolve(model, **spec, layers_pattern="layers")
    with pytest.raises(ValueError, match="regular expression"):
        resolve(model, target_modules=".*q_proj", layers_to_transform=1)


def test_layers_where_peft_has_none() -> None:
    """Layers that stand first in the names, and layers of all-linear: peft refuses both."""
    inner = base("llama").model
    assert resolve(inner, target_modules=["q_proj"], layers_to_transform=[1]) == ["layers.1.self_attn.q_proj"]
    assert chosen_by_peft(inner, target_modules=["q_proj"], layers_to_transform=[1]) is None
    assert len(resolve(base("llama"), target_modules="all-linear", layers_to_transform=[1])) == 7
    assert chosen_by_peft(base("llama"), target_modules="all-linear", layers_to_transform=[1]) is None


def test_exclusion() -> None:
    model = llama()
    assert len(resolve(model, target_modules=["q_proj"], exclude_modules=r".*\.0\..*")) == 1
    with pytest.raises(
        ValueError, match=r"matches 2 modules such as 'model.*exclude_modules removes all|=\['q_proj'\] removes all"
    ):
        resolve(model, target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"exclude_modules='\[' is no valid regular expression: unterminated"):
        resolve(model, target_modules=["q_proj"], exclude_modules="[")
    with pytest.warns(UserWarning, match="exclude_modules: no module is named 'k_prj'; did you mean 'k_proj'"):
        resolve(model, target_modules=["q_proj"], exclude_modules=["k_prj"])
    with pytest.warns(UserWarning, match="exclude_modules='k_proj' matches no module"):
        resolve(model, target_modules=["q_proj"], exclude_modules="k_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(model, target_modules="all-linear", exclude_modules=["lm_head"])  # a habit, and right


def test_skipped_modules() -> None:
    model = llama()
    skip = {"model.layers.0", "lm_head"}
    assert resolve(model, skip=skip, target_modules=["q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert len(resolve(model, skip=skip, target_modules="all-linear")) == 7
    assert len(found(model, skip=skip, target_modules=[], target_parameters=["q_proj.weight"]).parameters) == 1
    with pytest.raises(ValueError, match="matches only 'lm_head', which modules_to_save trains as a full copy"):
        resolve(model, target_modules=["lm_head"], modules_to_save=["lm_head"])


# What is said.


def test_what_is_said_of_names_that_match_nothing() -> None:
    model = llama()
    with pytest.warns(UserWarning, match="no module is named 'v_prj'; did you mean 'v_proj'"):
        resolve(model, target_modules=["q_proj", "v_prj"])  # peft says nothing
    with pytest.raises(ValueError) as caught:
        resolve(model, target_modules=["q_prj", "self_atn.v_proj"])
    assert "'q_prj'; did you mean 'q_proj'?, 'self_atn.v_proj'; did you mean 'self_attn.v_proj'?" in str(caught.value)
    assert "names in this model: embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj" in str(caught.value)
    with pytest.raises(ValueError, match=r'write it as r"\.\*\\\.\(q_proj\|v_proj\)", or name endings in a list'):
        resolve(model, target_modules="q_proj|v_proj")
    with pytest.raises(ValueError, match="'all_linear' matches no module; did you mean 'all-linear'"):
        resolve(model, target_modules="all_linear")
    with pytest.raises(ValueError, match=r"target_modules='\(q' is no valid regular expression: missing \), unterm"):
        resolve(model, target_modules="(q")
    with pytest.raises(ValueError, match="a LlamaMLP, which cannot be adapted"):
        resolve(model, target_modules=["mlp"])
    with pytest.raises(ValueError, match="name at least one module"):
        resolve(model, target_modules=[])
    with pytest.raises(TypeError, match=r"target_modules=5: must be a list of names"):
        resolve(model, target_modules=5)


def test_what_is_said_without_a_default() -> None:
    with pytest.raises(ValueError, match=r'no default for model type None; name.*target_modules="all-linear"'):
        resolve(nn.Sequential(nn.Linear(2, 2)))
    model = llama()
    model.config.model_type = "camel"
    with pytest.raises(
        ValueError, match=r"LORA has no default for model type 'camel'.*=\['q_proj', 'k_proj'\], or use"
    ):
        resolve(model)
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"target_modules=\['c_attn'\] \(the defaults for gpt2\) matches no module"):
        resolve(model)
    chosen = found(model, target_parameters=["up_proj.weight"])  # only the parameters were asked for
    assert (chosen.modules, len(chosen.parameters)) == ([], 2)


def test_what_is_said_of_parameters() -> None:
    model = base("mixtral")
    with pytest.raises(ValueError, match="no parameter is named 'experts.down_prj'; did you mean 'experts.down_proj'"):
        resolve(model, target_parameters=["experts.down_prj"])
    with pytest.raises(ValueError, match=r"there are .*experts\.gate_up_proj"):
        resolve(model, target_parameters=["no_such"])
    with pytest.warns(UserWarning, match="target_parameters: no parameter is named 'w1'"):
        found(model, target_modules=[], target_parameters=["w1", "experts.down_proj"])
    with pytest.warns(UserWarning, match=r"no module is named 'down_proj' \(it is a bare parameter: use target_param"):
        found(model, target_modules=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"use target_parameters=\['experts\.down_proj'\]"):
        found(model, target_modules=["down_proj"])
    with pytest.raises(TypeError, match="target_parameters='down_proj': must be a list"):
        found(model, target_parameters="down_proj")


# Cost. No absolute time is asserted.


def cost(model: nn.Module, **options: Any) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        resolve(model, **options)
        best = min(best, time.perf_counter() - start)
    return best


def test_a_long_list_costs_what_a_short_one_does() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=20))
    names = resolve(model, target_modules="all-linear")
    assert resolve(model, target_modules=names) == names
    assert cost(model, target_modules=names) < 10 * cost(model, target_modules=["q_proj", "up_proj"])


def test_resolving_many_layers_does_not_depend_on_adapters_present() -> None:
    import veneer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=20))
    before = cost(model, target_modules="all-linear")
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    for i in range(10):
        adapted.add_adapter(f"a{i}", veneer.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    assert cost(model, target_modules="all-linear") < 3 * before
