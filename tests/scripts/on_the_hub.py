"""Adapters to the hub and from it; HF_ENDPOINT says where it is."""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

installed = importlib.metadata.version
# transformers 5.24 wants a later release than the one that is installed here to compare with.
importlib.metadata.version = lambda name: "0.22.0" if name == "peft" else installed(name)

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

mine = sys.argv[1]  # repositories of this run begin with it
folder = Path(tempfile.mkdtemp())
ids = torch.arange(8)[None]
torch.manual_seed(0)
LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2)
).save_pretrained(folder / "base")  # fmt: skip
AutoModelForCausalLM.from_pretrained(folder / "base").push_to_hub(f"me/{mine}-base")


def base():
    return AutoModelForCausalLM.from_pretrained(f"me/{mine}-base")


def says(m):
    m.eval()
    with torch.no_grad():
        return m(input_ids=ids).logits


model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
wanted = says(model)
model.push_to_hub(f"me/{mine}-adapter", commit_message="the first", private=True)
files = set(HfApi().list_repo_files(f"me/{mine}-adapter"))
assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
config = PeftConfig.from_pretrained(f"me/{mine}-adapter")
assert config.r == 4 and config.base_model_name_or_path == f"me/{mine}-base"
loaded = PeftModel.from_pretrained(base(), f"me/{mine}-adapter")
torch.testing.assert_close(says(loaded), wanted)
torch.testing.assert_close(says(AutoPeftModelForCausalLM.from_pretrained(f"me/{mine}-adapter")), wanted)
torch.testing.assert_close(says(AutoModelForCausalLM.from_pretrained(f"me/{mine}-adapter")), wanted)
other = base()
other.load_adapter(f"me/{mine}-adapter")
torch.testing.assert_close(says(other), wanted)

HfApi().create_branch(f"me/{mine}-adapter", branch="half")
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(0.5)
model.push_to_hub(f"me/{mine}-adapter", revision="half")
half = PeftModel.from_pretrained(base(), f"me/{mine}-adapter", revision="half")
torch.testing.assert_close(says(half), says(model))
assert not torch.allclose(says(half), wanted)

model.save_pretrained(folder / "saved")
HfApi().upload_folder(repo_id=f"me/{mine}-adapter", folder_path=folder / "saved", path_in_repo="below")
below = PeftModel.from_pretrained(base(), f"me/{mine}-adapter", subfolder="below")
torch.testing.assert_close(says(below), says(model))

data = Dataset.from_dict({"input_ids": [list(range(8))] * 8, "labels": [list(range(8))] * 8})
arguments = TrainingArguments(
    output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
    push_to_hub=True, hub_model_id=f"me/{mine}-trained", hub_strategy="end", save_strategy="no",
)  # fmt: skip
trainer = Trainer(
    model=get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=2)), args=arguments, train_dataset=data
)
trainer.train()
trainer.push_to_hub()
trained = PeftModel.from_pretrained(base(), f"me/{mine}-trained")
torch.testing.assert_close(says(trained), says(trainer.model))

for wrong in (f"me/{mine}-nothing", f"me/{mine}-base"):
    try:
        PeftModel.from_pretrained(base(), wrong)
    except Exception as error:  # ValueError of either library, or the hub's own
        assert wrong in str(error), error
    else:
        raise AssertionError(f"{wrong} was loaded")
