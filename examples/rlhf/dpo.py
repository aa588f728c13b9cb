"""DPO: a policy with LoRA; the reference is the same base without its adapter.

python -m veneer.peft examples/rlhf/dpo.py
"""

import torch
from common import answers, arguments, logged, measured, open_model, preferences, questions, report, settings
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer


def main():
    given = arguments("DPO on pairs of answers", steps=15, learning_rate=2e-4, batch=4).parse_args()
    set_seed(given.seed)
    path, tokenizer = open_model(given.model)
    train, held_out = questions()
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(**settings(given), beta=0.1, max_length=128),
        train_dataset=Dataset.from_list(preferences(train)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear"
        ),
    )
    before = answers(trainer.model, tokenizer, held_out)
    trainer.train()
    trainer.save_model()
    after = answers(trainer.model, tokenizer, held_out)
    samples = [(r["question"], old, new) for r, old, new in zip(held_out, before, after, strict=True)][:3]
    report(
        given.out,
        measured(before),
        measured(after),
        logged(trainer, "rewards/margins"),
        "margin of implied reward",
        samples,
    )


if __name__ == "__main__":
    main()
