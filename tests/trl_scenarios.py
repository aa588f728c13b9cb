"""TRL's trainers with `peft_config=`, as a script writes them; it says `peft` and runs under peft and under the stand-in.

    python trl_scenarios.py FOLDER RESULT.json [SCENARIO ...]
    python -m veneer.peft trl_scenarios.py FOLDER RESULT.json [SCENARIO ...]

FOLDER holds the tiny models `causal`, `tied` and `classifier` with a tokenizer; see `test_frameworks_trl.py`.
"""

import json
import sys
import tempfile
import traceback
import warnings
import zlib
from pathlib import Path

import peft
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

warnings.filterwarnings("ignore")
FOLDER = Path(sys.argv[1])
WORDS = ["red", "green", "blue", "one", "two", "three"]
SFT_DATA = [{"prompt": f"say {w} {i}", "completion": f" {w} {w}"} for i in range(4) for w in WORDS]
PAIRS = [{"prompt": f"say {w} {i}", "chosen": f" {w} {w}", "rejected": f" {v} {w}"}
         for i in range(4) for w, v in zip(WORDS, reversed(WORDS), strict=True)]  # fmt: skip
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def lora(**options):
    return LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["q_proj", "v_proj", "down_proj"], **options})


def quick(kind, folder, **options):
    return kind(**{
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "lr_scheduler_type": "constant", **options})  # fmt: skip


def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER / "causal")


def causal(name="causal"):
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)


def classifier():
    return AutoModelForSequenceClassification.from_pretrained(FOLDER / "classifier", num_labels=1, dtype=torch.float32)


def same_start(model, adapter="default", zero=True):
    """Values that depend on the key alone, so that both sides start from one adapter."""
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    for key, tensor in state.items():
        if "lora_B" in key and zero:
            state[key] = torch.zeros_like(tensor)
        elif "lora_" in key or "prompt" in key:
            drawn = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            state[key] = torch.randn(tensor.shape, generator=drawn) * 0.2
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def base_values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad and "ref" not in n}


def train(trainer, zero=True, start=True, resume=None):
    """Train; what the log says of each step, and whether the frozen parameters stayed as they were."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if start:
        same_start(model, zero=zero)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    torch.manual_seed(7)
    trainer.train(resume_from_checkpoint=resume)
    after = get_peft_model_state_dict(model)
    parameters = dict(model.named_parameters())
    found = {
        "log": [{k: v for k, v in row.items() if isinstance(v, float)} for row in trainer.state.log_history[:-1]],
        "changed": sorted(k for k in after if not torch.equal(after[k], before[k])),
        "keys": sorted(after),
        "frozen": all(torch.equal(parameters[n], v) for n, v in frozen.items()),
        "state": {k: v.detach().float().norm().item() for k, v in after.items()},
        "trainable": model.get_nb_trainable_parameters()[0],
        "peft_model": isinstance(model, PeftModel),
    }
    return found


def logits(model):
    model.eval()
    ids = tokenizer()("say red 1 red red", return_tensors="pt")["input_ids"]  # (1, n)
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].tolist()


@scenario
def sft(folder):
    """Train with a checkpoint, save, load twice, resume: all the same."""

    def make(where, steps):
        return SFTTrainer(
            causal(), quick(SFTConfig, where, max_steps=steps, save_strategy="steps", save_steps=2),
            train_dataset=Dataset.from_list(SFT_DATA), processing_class=tokenizer(),
            peft_config=lora(task_type="CAUSAL_LM"))  # fmt: skip

    trainer = make(folder, 4)
    found = train(trainer)
    trainer.save_model(str(folder / "saved"))
    found["files"] = sorted(p.name for p in (folder / "saved").iterdir())
    found["trained"] = logits(trainer.model)
    found["reloaded"] = logits(PeftModel.from_pretrained(causal(), str(folder / "saved")))
    found["auto"] = logits(AutoPeftModelForCausalLM.from_pretrained(str(folder / "saved"), dtype=torch.float32))
    again = make(folder, 4)
    found["resumed_log"] = train(again, start=False, resume=str(folder / "checkpoint-2"))["log"]
    found["resumed"] = logits(again.model)
    merged = trainer.model.merge_and_unload()
    found["merged"] = logits(merged)
    return found


@scenario
def sft_wrapped(folder):
    """A model that was wrapped before, with a head of its own."""
    model = get_peft_model(causal(), lora(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    trainer = SFTTrainer(model, quick(SFTConfig, folder, gradient_checkpointing=False),
                         train_dataset=Dataset.from_list(SFT_DATA), processing_class=tokenizer())  # fmt: skip
    return train(trainer)


@scenario
def sft_prompt_tuning(folder):
    """Soft prompts through TRL, which shifts the labels by itself."""
    trainer = SFTTrainer(
        causal(), quick(SFTConfig, folder, gradient_checkpointing=False), train_dataset=Dataset.from_list(SFT_DATA),
        processing_class=tokenizer(), peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))  # fmt: skip
    return train(trainer)


@scenario
def sft_chunked(folder):
    """The loss from hidden states and the head's weight, without logits, with a trained head."""
    trainer = SFTTrainer(
        causal(), quick(SFTConfig, folder, loss_type="chunked_nll"), train_dataset=Dataset.from_list(SFT_DATA),
        processing_class=tokenizer(), peft_config=lora(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))  # fmt: skip
    return train(trainer)


@scenario
def sft_tokens(folder):
    """Rows of an embedding that the head is tied to, as TRL asks for where a chat template brings new tokens."""
    trainer = SFTTrainer(
        causal("tied"), quick(SFTConfig, folder, learning_rate=0.1), train_dataset=Dataset.from_list(SFT_DATA),
        processing_class=tokenizer(), peft_config=lora(trainable_token_indices={"embed_tokens": [7, 8, 9]}))  # fmt: skip
    return train(trainer)


@scenario
def dpo(folder):
    """One base for policy and reference, which is the base without its adapter."""
    seen = []
    disable = PeftModel.disable_adapter

    def watched(self):
        seen.append(type(self).__name__)
        return disable(self)

    trainer = DPOTrainer(causal(), args=quick(DPOConfig, folder), train_dataset=Dataset.from_list(PAIRS),
                         processing_class=tokenizer(), peft_config=lora(task_type="CAUSAL_LM"))  # fmt: skip
    PeftModel.disable_adapter = watched
    try:
        found = train(trainer)
    finally:
        PeftModel.disable_adapter = disable
    found["disabled"] = len(seen)
    found["reference"] = trainer.ref_model is None
    trainer.save_model(str(folder / "saved"))
    found["trained"] = logits(trainer.model)
    found["reloaded"] = logits(PeftModel.from_pretrained(causal(), str(folder / "saved")))
    return found


@scenario
def dpo_precomputed(folder):
    """The reference's log-probabilities are computed once, before training."""
    trainer = DPOTrainer(causal(), args=quick(DPOConfig, folder, precompute_ref_log_probs=True),
                         train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer(),
                         peft_config=lora(task_type="CAUSAL_LM"))  # fmt: skip
    return train(trainer)


def with_policy(**options):
    """A model whose adapter is not the identity."""
    model = get_peft_model(causal(), lora(task_type="CAUSAL_LM", **options))
    same_start(model, zero=False)
    return model


@scenario
def dpo_trained_before(folder):
    """An adapter that was trained before: the reference is a frozen copy of it, by the name "ref"."""
    trainer = DPOTrainer(with_policy(), args=quick(DPOConfig, folder), train_dataset=Dataset.from_list(PAIRS),
                         processing_class=tokenizer())  # fmt: skip
    model = trainer.model
    before = get_peft_model_state_dict(model, adapter_name="default")
    reference = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="ref").items()}
    found = {"copied": all(torch.equal(before[k], reference[k]) for k in before)}
    found |= train(trainer, start=False)
    after = get_peft_model_state_dict(model, adapter_name="ref")
    found["reference_kept"] = all(torch.equal(after[k], reference[k]) for k in reference)
    found["adapters"] = sorted(model.peft_config)
    found["active"] = model.active_adapter
    return found


@scenario
def reward(folder):
    """A ranker: the head is trained beside LoRA, and comes back from the file."""
    rows = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in PAIRS]
    trainer = RewardTrainer(classifier(), quick(RewardConfig, folder, max_steps=6), processing_class=tokenizer(),
                            train_dataset=Dataset.from_list(rows), peft_config=lora(task_type="SEQ_CLS"))  # fmt: skip
    found = train(trainer)
    trainer.save_model(str(folder / "saved"))
    ids = tokenizer()(rows[0]["chosen"], return_tensors="pt")["input_ids"]  # (1, n)
    for name, model in (
        ("trained", trainer.model),
        ("reloaded", PeftModel.from_pretrained(classifier(), str(folder / "saved"))),
    ):
        with torch.no_grad():
            found[name] = model.eval()(input_ids=ids).logits[0].tolist()
    return found


def share_of_red(completions, **_):
    return [c.split().count("red") / max(1, len(c.split())) for c in completions]


PROMPTS = [{"prompt": f"say {w}"} for w in WORDS]


def sampled(kind, folder, **options):
    return quick(kind, folder, num_generations=4, max_completion_length=5, temperature=1.0, **options)


@scenario
def grpo(folder):
    """Sampling, reward and the KL term against the base without its adapter."""
    trainer = GRPOTrainer(causal(), share_of_red, args=sampled(GRPOConfig, folder, beta=0.04),
                          train_dataset=Dataset.from_list(PROMPTS), processing_class=tokenizer(),
                          peft_config=lora(task_type="CAUSAL_LM"))  # fmt: skip
    found = train(trainer)
    found["reference"] = trainer.ref_model is None
    trainer.save_model(str(folder / "saved"))
    found["trained"] = logits(trainer.model)
    found["reloaded"] = logits(AutoPeftModelForCausalLM.from_pretrained(str(folder / "saved"), dtype=torch.float32))
    return found


@scenario
def grpo_trained_before(folder):
    """An adapter that was trained before, with its frozen copy as the reference."""
    trainer = GRPOTrainer(with_policy(), share_of_red, args=sampled(GRPOConfig, folder, beta=0.04),
                          train_dataset=Dataset.from_list(PROMPTS), processing_class=tokenizer())  # fmt: skip
    found = train(trainer, start=False)
    found["adapters"] = sorted(trainer.model.peft_config)
    return found


@scenario
def grpo_refuses_the_head(folder):
    """TRL knows an adapted head by its class, and refuses it."""
    try:
        GRPOTrainer(causal(), share_of_red, args=sampled(GRPOConfig, folder),
                    train_dataset=Dataset.from_list(PROMPTS), processing_class=tokenizer(),
                    peft_config=lora(target_modules=["q_proj", "lm_head"]))  # fmt: skip
    except ValueError as error:
        return {"refused": "lm_head" in str(error)}
    return {"refused": False}


@scenario
def rloo(folder):
    trainer = RLOOTrainer(causal(), share_of_red, args=sampled(RLOOConfig, folder),
                          train_dataset=Dataset.from_list(PROMPTS), processing_class=tokenizer(),
                          peft_config=lora(task_type="CAUSAL_LM"))  # fmt: skip
    return train(trainer)


@scenario
def kto(folder):
    rows = [{"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
            for r in PAIRS for k in ("chosen", "rejected")]  # fmt: skip
    trainer = KTOTrainer(causal(), args=quick(KTOConfig, folder), train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer(), peft_config=lora(task_type="CAUSAL_LM"))  # fmt: skip
    return train(trainer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {"peft": peft.__file__, "version": peft.__version__}
    for name in sys.argv[3:] or SCENARIOS:
        with tempfile.TemporaryDirectory() as place:
            try:
                results[name] = SCENARIOS[name](Path(place))
            except Exception:
                results[name] = {"error": traceback.format_exc()}
    Path(sys.argv[2]).write_text(json.dumps(results))
