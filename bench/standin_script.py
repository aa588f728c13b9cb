"""A script of peft's own words: LoRA on a Llama built from a config, trained by Trainer. `standin.py` runs it twice.

It stops before every few steps until a line comes on its input, so that two of these can be timed in turn.
"""

import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
torch.manual_seed(0)
shape = {"hidden_size": given["hidden"], "intermediate_size": given["hidden"] * 7 // 2, "vocab_size": 2048}
base = LlamaForCausalLM(
    LlamaConfig(**shape, num_hidden_layers=given["layers"], num_attention_heads=8, num_key_value_heads=2)
)
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **given["config"]))
starts = torch.Generator().manual_seed(1)
for _, parameter in sorted((n, p) for n, p in model.named_parameters() if "lora_A" in n):
    parameter.data = torch.randn(parameter.shape, generator=starts) * 0.02


class Drawn(Dataset):
    """Rows of drawn token ids, `(tokens,)` int64."""

    def __init__(self):
        self.ids = torch.randint(0, 2048, (64, given["tokens"]), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return 100_000

    def __getitem__(self, i):
        ids = self.ids[i % 64]
        return {"input_ids": ids, "labels": ids}


def resident():
    """Bytes in memory at the most, since the process started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Turns(TrainerCallback):
    """Times blocks of steps, each begun by a line on stdin."""

    def __init__(self):
        self.start = None

    def on_step_begin(self, arguments, state, control, **_):
        if state.global_step % given["block"]:
            return
        now = time.perf_counter()
        if self.start is not None:
            print("took", now - self.start, resident(), flush=True)
        if not sys.stdin.readline().strip():
            control.should_training_stop = True
        self.start = time.perf_counter()


before = resident()
arguments = TrainingArguments(
    output_dir=given["folder"],
    per_device_train_batch_size=given["rows"],
    max_steps=given["block"] * given["rounds"],
    learning_rate=1e-3,
    logging_steps=given["block"],
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    gradient_checkpointing=given["checkpointing"],
    dataloader_pin_memory=False,
)
turns = Turns()
trainer = Trainer(model=model, args=arguments, train_dataset=Drawn(), callbacks=[turns])
trainer.train()
took = time.perf_counter() - turns.start
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("end", json.dumps({"took": took, "peak": resident(), "before": before, "losses": losses}), flush=True)
