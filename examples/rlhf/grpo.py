"""GRPO: a policy with LoRA and a checkable reward; the reference is the same base without its adapter.

python -m veneer.peft examples/rlhf/grpo.py
python -m veneer.peft examples/rlhf/grpo.py --ranker runs/rlhf/reward
"""

import torch
from common import (
    LIMIT,
    answers,
    arguments,
    brief_number,
    logged,
    measured,
    open_model,
    prompt,
    questions,
    report,
    settings,
)
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer


def main():
    parser = arguments("GRPO with a checkable reward", steps=25, learning_rate=5e-4, batch=8)
    parser.add_argument("--ranker", help="folder of the reward model of reward.py; its reward is trained on instead")
    parser.add_argument("--limit", type=int, default=LIMIT, help="new tokens of an answer")
    given = parser.parse_args()
    set_seed(given.seed)
    path, tokenizer = open_model(given.model)
    train, held_out = questions()
    rewards, weights = [brief_number], [1.0]
    if given.ranker:
        ranker = AutoPeftModelForSequenceClassification.from_pretrained(given.ranker, num_labels=1, dtype=torch.float32)
        ranker.config.pad_token_id = tokenizer.pad_token_id
        rewards, weights = [brief_number, ranker.merge_and_unload()], [0.0, 1.0]  # the first is only looked at
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        rewards,
        args=GRPOConfig(
            **settings(given), num_generations=given.batch_size, max_completion_length=given.limit, beta=0.04,
            temperature=1.0, reward_weights=weights,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt(r)} for r in train]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear"),
    )  # fmt: skip
    before = answers(trainer.model, tokenizer, held_out, given.limit)
    trainer.train()
    trainer.save_model()
    after = answers(trainer.model, tokenizer, held_out, given.limit)
    samples = [(r["question"], old, new) for r, old, new in zip(held_out, before, after, strict=True)][:3]
    curve = logged(trainer, "rewards/brief_number/mean")
    report(given.out, measured(before), measured(after), curve, "reward of sampled answers", samples)


if __name__ == "__main__":
    main()
