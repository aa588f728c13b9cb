"""Soft prompts against peft: from peft's files, and the other way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import gap, shake
from safetensors.torch import load_file
from torch import Tensor

import veneer
from models import IDS
from small import deviation
from test_door import CAUSAL, ENCODER, SEQ2SEQ, auto
from veneer.files import adapter_files, state_dict

MAKE = {
    **{name: CAUSAL[name] for name in ("llama", "gpt2", "opt", "gpt_neox", "mistral")},
    **SEQ2SEQ,
    "bert": auto("SequenceClassification", "BertConfig", **ENCODER),
    "roberta": auto("SequenceClassification", "RobertaConfig", **ENCODER),
    "bert_tokens": auto("TokenClassification", "BertConfig", **ENCODER),
    "bert_body": auto("", "BertConfig", **ENCODER),
}
TASK = {
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "bert_tokens": "TOKEN_CLS",
}
TASK |= {"bert_body": "FEATURE_EXTRACTION"}
P = {"num_virtual_tokens": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {**P}),
    "p_tuning": ("PromptEncoderConfig", {**P, "encoder_hidden_size": 8}),
    "p_tuning_lstm": ("PromptEncoderConfig", {**P, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {**P}),
    "prefix_projection": ("PrefixTuningConfig", {**P, "prefix_projection": True, "encoder_hidden_size": 8}),
    "multitask": ("MultitaskPromptTuningConfig", {**P, "num_tasks": 3, "num_ranks": 2}),
    "cpt": (
        "CPTConfig",
        {"cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12], "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8], "cpt_mask": [1] * 8,
         "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.8, "opt_projection_epsilon": 2.0},
    ),
}  # fmt: skip
# Where peft 0.21.2 has no working way: its prefixes need a `past_key_values` that transformers 5.24 renamed in encoders,
# its multitask prompts pass no task in encoders' tasks, CPT is for causal models.
NOT = {
    "prefix": ("bert", "roberta", "bert_tokens", "bert_body"),
    "prefix_projection": ("bert", "roberta", "bert_tokens", "bert_body"),
    "multitask": ("bart", "t5", "bert_body"),
    "cpt": ("t5", "bart", "bert", "roberta", "bert_tokens", "bert_body"),
}
CELLS = [(case, name) for case in CASES for name in MAKE if name not in NOT.get(case, ())]
cells = pytest.mark.parametrize(("case", "name"), CELLS)
pytestmark = pytest.mark.filterwarnings("ignore")


def config_of(library: Any, case: str, name: str) -> Any:
    cls, options = CASES[case]
    return getattr(library, cls)(task_type=TASK.get(name, "CAUSAL_LM"), **options)


def inputs(case: str, name: str) -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[1, -3:] = 0
    given: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": mask}
    if name in SEQ2SEQ:
        given["decoder_input_ids"] = IDS[:, :6].contiguous()
    if case == "multitask":
        given["task_ids"] = torch.tensor([2, 0])
    return given


def said(model: Any, case: str, name: str) -> Tensor:
    """What the model returns at the caller's own positions."""
    out = model(**inputs(case, name))
    logits = out.last_hidden_state if name == "bert_body" else out.logits
    own = {"bert": 0, "roberta": 0}.get(name, 6 if name in SEQ2SEQ else 12)
    return logits[:, -own:] if own else logits


def loss_of(model: Any, case: str, name: str) -> Tensor:
    """A loss of the caller's own positions, the same in both libraries."""
    y = said(model, case, name)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return (y * weights).sum() + y.square().mean()


def made_by(library: Any, case: str, name: str, folder: Path) -> Any:
    torch.manual_seed(1)
    model = library.get_peft_model(MAKE[name](), config_of(library, case, name))
    shake(model, 0.3)
    model.save_pretrained(str(folder))
    return model.eval()


def loaded_by(library: Any, name: str, folder: Path, **options: Any) -> Any:
    return library.PeftModel.from_pretrained(MAKE[name](), str(folder), **options).eval()


@cells
def test_outputs_from_pefts_file(case: str, name: str, tmp_path: Path) -> None:
    theirs = made_by(peft, case, name, tmp_path)
    expected = said(theirs, case, name).detach()
    assert gap(said(loaded_by(veneer, name, tmp_path), case, name), expected) <= 1e-5
    assert gap(said(loaded_by(peft, name, tmp_path), case, name), expected) <= 1e-5
    plain = {k: v for k, v in inputs(case, name).items() if k != "task_ids"}
    out = MAKE[name]()(**plain)
    own = out.last_hidden_state if name == "bert_body" else out.logits
    assert gap(expected, own) > 1e-4, "the adapter is too small to show a mistake"


@cells
def test_peft_reads_our_file(case: str, name: str, tmp_path: Path) -> None:
    ours = made_by(veneer, case, name, tmp_path)
    expected = said(ours, case, name).detach()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = loaded_by(peft, name, tmp_path)
    assert not [str(w.message) for w in seen if "missing" in str(w.message) or "nexpected" in str(w.message)]
    assert gap(said(theirs, case, name), expected) <= 1e-5
    assert gap(said(loaded_by(veneer, name, tmp_path), case, name), expected) <= 1e-6


@cells
def test_files_have_the_same_keys_and_shapes(case: str, name: str, tmp_path: Path) -> None:
    theirs, ours = (made_by(lib, case, name, tmp_path / lib.__name__) for lib in (peft, veneer))
    a, b = (
        {k: v.shape for k, v in load_file(tmp_path / lib.__name__ / "adapter_model.safetensors").items()}
        for lib in (peft, veneer)
    )
    assert a == b
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    one, two = (json.loads((tmp_path / lib.__name__ / "adapter_config.json").read_text()) for lib in (peft, veneer))
    assert one.keys() == two.keys()
    for key in one.keys() - {"peft_version", "auto_mapping", "modules_to_save"}:
        assert one[key] == two[key] or (not one[key] and not two[key]), key


def matched(ours: Any, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What is trained in both, by Veneer's names."""
    known = {n.replace("prompt_encoder.default.", "").replace("modules_to_save.default.", "").removeprefix("base_model."): p
             for n, p in theirs.named_parameters()}  # fmt: skip
    renamed = {"embedding": "embedding.weight", "delta": "delta_embedding.weight"}
    renamed |= {"cols": "prefix_task_cols", "rows": "prefix_task_rows"}
    mine = {k.rpartition("|")[2]: v for k, v in ours.runtime.training_state("default").items()}
    return {k: (v, known[renamed.get(k, k)]) for k, v in mine.items()}


@cells
def test_gradients(case: str, name: str, tmp_path: Path) -> None:
    """peft cannot load a soft prompt to train it, so its own fresh one is compared with ours, given the same tensors."""
    theirs = made_by(peft, case, name, tmp_path)
    torch.manual_seed(1)
    ours = veneer.get_peft_model(MAKE[name](), config_of(veneer, case, name)).eval()
    pairs = matched(ours, theirs)
    with torch.no_grad():
        for own, other in pairs.values():
            own.copy_(other)
    assert len(pairs) == sum(p.requires_grad for p in ours.parameters())
    assert abs(loss_of(ours, case, name) - loss_of(theirs, case, name)) <= 1e-4
    loss_of(ours, case, name).backward()
    loss_of(theirs, case, name).backward()
    reached = 0
    for short, (own, other) in pairs.items():
        a, b = (torch.zeros_like(other) if p.grad is None else p.grad for p in (own, other))
        assert gap(a, b) <= 1e-5, (short, gap(a, b))
        reached += bool(b.any())
    assert reached


def test_multitask_prompts_of_encoder_decoders_enter_both_stacks(tmp_path: Path) -> None:
    """peft reads and writes them; its forward takes them where it makes the decoder's inputs itself, from labels."""
    ours = made_by(veneer, "multitask", "t5", tmp_path)
    theirs = loaded_by(peft, "t5", tmp_path)
    labels, tasks = IDS[:, :6].contiguous(), torch.tensor([2, 0])
    got = ours(input_ids=IDS, labels=labels, task_ids=tasks).logits
    other = theirs(input_ids=IDS, labels=labels, task_ids=tasks).logits
    assert got.shape == (2, 6, 64)
    assert gap(got, other[:, -6:]) <= 1e-5
    ids = ours.generate(input_ids=IDS, task_ids=tasks, max_new_tokens=5, do_sample=False)
    again = ours.generate(input_ids=IDS, task_ids=tasks, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(ids, again)
    beams = ours.generate(input_ids=IDS, task_ids=tasks, max_new_tokens=5, num_beams=2)
    assert beams.shape[0] == 2
    with pytest.raises(ValueError, match="say each row's task with task_ids"):
        ours(input_ids=IDS, labels=labels)
    with pytest.raises(ValueError, match="numbers from 0 to 2"):
        ours(input_ids=IDS, labels=labels, task_ids=torch.tensor([3, 0]))


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_starts(start: str, tmp_path: Path) -> None:
    made_by(peft, "multitask", "llama", tmp_path)
    source = str(tmp_path / "adapter_model.safetensors")
    options = {
        **P,
        "num_tasks": 1,
        "num_ranks": 2,
        "prompt_tuning_init": start,
        "prompt_tuning_init_state_dict_path": source,
    }
    options |= {"task_type": "CAUSAL_LM", "prompt_tuning_init_task": 1}
    models = []
    for library in (peft, veneer):
        torch.manual_seed(3)
        models.append(library.get_peft_model(MAKE["llama"](), library.MultitaskPromptTuningConfig(**options)))
    theirs, ours = models
    encoder = dict(theirs.prompt_encoder["default"].named_parameters())
    own = {k.rpartition("|")[2]: v for k, v in ours.runtime.training_state("default").items()}
    assert torch.equal(own["embedding"], encoder["embedding.weight"])
    if start != "ONLY_SOURCE_SHARED":
        assert torch.equal(own["cols"], encoder["prefix_task_cols"]) and torch.equal(
            own["rows"], encoder["prefix_task_rows"]
        )
    assert own["cols"].shape == (1, 4, 2)
    wrong = {**options, "num_virtual_tokens": 5}
    with pytest.raises(ValueError, match="prompt_embeddings gives .4, 32. .* the config asks for .5, 32."):
        veneer.get_peft_model(MAKE["llama"](), veneer.MultitaskPromptTuningConfig(**wrong))
    with pytest.raises(ValueError, match="there is no such file"):
        missing = {**options, "prompt_tuning_init_state_dict_path": str(tmp_path / "none.safetensors")}
        veneer.get_peft_model(MAKE["llama"](), veneer.MultitaskPromptTuningConfig(**missing))


def test_the_prompt_of_words_starts_where_pefts_does(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(60)} | {"[UNK]": 60}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path)
    options = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tmp_path), "task_type": "CAUSAL_LM"}
    starts = []
    for library in (peft, veneer):
        config = library.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init_text="w3 w9 w4", **options)
        model = library.get_peft_model(MAKE["llama"](), config)
        starts.append(
            peft.get_peft_model_state_dict(model) if library is peft else state_dict.get_peft_model_state_dict(model)
        )
    assert torch.equal(starts[0]["prompt_embeddings"], starts[1]["prompt_embeddings"])
    rows = MAKE["llama"]().get_input_embeddings().weight
    assert torch.equal(starts[1]["prompt_embeddings"], rows[[3, 9, 4, 3, 9]])
    config = veneer.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init_text="w3 w9 w4", **options)
    with pytest.raises(
        ValueError, match="prompt_tuning_init_text has 3 tokens; use num_virtual_tokens=3, or a shorter"
    ):
        veneer.get_peft_model(MAKE["llama"](), config)
    sampled = veneer.get_peft_model(
        MAKE["llama"](), veneer.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    )
    table = dict(adapter_files.named_tensors(sampled))["prompt_embeddings"]
    assert all((rows == row).all(1).any() for row in table)


def test_cpt_learns_as_in_peft() -> None:
    """The weighted loss over examples and input, and projected descent: the same curve."""
    kinds = torch.tensor([[1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 0, 0]] * 2)
    curves = []
    for library in (peft, veneer):
        torch.manual_seed(2)
        model = library.get_peft_model(MAKE["llama"](), config_of(library, "cpt", "llama")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            out = model(input_ids=IDS, labels=IDS.clone(), input_type_mask=kinds.clone())
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        curves.append(torch.tensor(losses))
        assert library is peft or out.logits.shape == (2, 12, 64)
    assert deviation(curves[0], curves[1]) <= 1e-5
    assert curves[1][-1] < curves[1][0]


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in CELLS if n in ("llama", "t5", "bert") and c not in ("multitask", "cpt")],
)
def test_twenty_training_steps(case: str, name: str, tmp_path: Path) -> None:
    theirs = made_by(peft, case, name, tmp_path)
    ours = veneer.get_peft_model(MAKE[name](), config_of(veneer, case, name)).eval()
    with torch.no_grad():
        for own, other in matched(ours, theirs).values():
            own.copy_(other)
    curves = []
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = said(model, case, name).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert deviation(curves[0], curves[1]) <= 1e-4
    assert curves[1][-1] < curves[1][0]


def test_a_saved_network_is_a_prompt_that_can_be_trained(tmp_path: Path) -> None:
    for case in ("p_tuning", "prefix_projection"):
        made_by(veneer, case, "llama", tmp_path)
        model = loaded_by(veneer, "llama", tmp_path, is_trainable=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 1
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert trained[0].grad.abs().sum() > 0
        fresh = veneer.get_peft_model(MAKE["llama"](), config_of(veneer, case, "llama"))
        with pytest.raises(
            ValueError, match="cannot be turned back into the network; load it as an adapter of its own"
        ):
            state_dict.set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
