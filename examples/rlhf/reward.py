"""Reward model: a ranker with LoRA and a trained head, on pairs of answers.

python -m veneer.peft examples/rlhf/reward.py
"""

import torch
from common import arguments, logged, open_model, preferences, questions, report, settings
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer


@torch.no_grad()
def ranked(model, tokenizer, pairs):
    """How often the preferred answer gets the higher reward, and by how much, on the mean."""
    model.eval()
    rewards = {}
    for side in ("chosen", "rejected"):
        texts = [tokenizer.apply_chat_template(p["prompt"] + p[side], tokenize=False) for p in pairs]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        rewards[side] = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]  # (n,)
    margin = rewards["chosen"] - rewards["rejected"]
    return {"ranked rightly": (margin > 0).float().mean().item(), "margin": margin.mean().item()}


def main():
    given = arguments("Reward model on pairs of answers", steps=15, learning_rate=5e-4, batch=4).parse_args()
    set_seed(given.seed)
    path, tokenizer = open_model(given.model)
    train, held_out = questions()
    held_out = preferences(held_out, every=True)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model,
        RewardConfig(**settings(given), max_length=128),
        train_dataset=Dataset.from_list(preferences(train)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="SEQ_CLS", r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear"
        ),
    )
    before = ranked(trainer.model, tokenizer, held_out)
    trainer.train()
    trainer.save_model()
    report(given.out, before, ranked(trainer.model, tokenizer, held_out), logged(trainer, "margin"), "margin of reward")


if __name__ == "__main__":
    main()
