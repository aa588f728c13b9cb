"""The code of peft's announcement, word for word, in a folder where its hub names are folders; a CPU stands for "cuda"."""

import torch
from transformers import AutoTokenizer

device = "cpu"
torch.manual_seed(0)
to = torch.Tensor.to
torch.Tensor.to = lambda self, *a, **k: to(self, *("cpu" if x == "cuda" else x for x in a), **k)

from transformers import AutoModelForSeq2SeqLM
from peft import get_peft_model, LoraConfig, TaskType

model_name_or_path = "bigscience/mt0-large"
tokenizer_name_or_path = "bigscience/mt0-large"

peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)

model = AutoModelForSeq2SeqLM.from_pretrained(model_name_or_path)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

# "The rest of the training loop stays the same."
tokenizer = AutoTokenizer.from_pretrained(tokenizer_name_or_path)
text = "Tweet text : @HondaCustSvc Your customer service has been horrible during the recall process. I will never purchase a Honda again. Label :"
rows, labels = tokenizer(text, return_tensors="pt"), tokenizer("complaint", return_tensors="pt").input_ids
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(250):
    loss = model(input_ids=rows["input_ids"], labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.save_pretrained("output_dir")

import shutil
from pathlib import Path

files = {p.name for p in Path("output_dir").iterdir()}
assert (
    {"adapter_config.json", "adapter_model.safetensors"}
    <= files
    <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
)
shutil.copytree("output_dir", "smangrul/twitter_complaints_bigscience_T0_3B_LORA_SEQ_2_SEQ_LM")

from transformers import AutoModelForSeq2SeqLM
from peft import PeftModel, PeftConfig

peft_model_id = "smangrul/twitter_complaints_bigscience_T0_3B_LORA_SEQ_2_SEQ_LM"
config = PeftConfig.from_pretrained(peft_model_id)
model = AutoModelForSeq2SeqLM.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(model, peft_model_id)
tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)

model = model.to(device)
model.eval()
inputs = tokenizer(
    "Tweet text : @HondaCustSvc Your customer service has been horrible during the recall process. I will never purchase a Honda again. Label :",
    return_tensors="pt",
)

with torch.no_grad():
    outputs = model.generate(input_ids=inputs["input_ids"].to("cuda"), max_new_tokens=10)
    print(tokenizer.batch_decode(outputs.detach().cpu().numpy(), skip_special_tokens=True)[0])
