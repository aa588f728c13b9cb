"""What the three scripts share: the questions, the checkable reward, the table and the plot."""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoTokenizer

from veneer.recipes.models import find_model

HERE = Path(__file__).parent
LIMIT = 24  # new tokens of an answer
WORSE = (  # each gets less of the reward than a brief number, and not all are long
    "That is a good question, and there are several things to consider before one can say anything about it.",
    "It depends.",
    "Many people ask about this. The answer depends on what you mean, so let us first look at the background.",
    "I do not know.",
    "It is {answer}, but that is not all that one can say about it, so let us look at it again from the beginning.",
)


def arguments(description, steps, learning_rate, batch):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m", help="embedded model, folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs") / "rlhf" / Path(description.split()[0].lower()))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--batch-size", type=int, default=batch)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def open_model(name):
    """Where the model is, and its tokenizer."""
    path = find_model(name)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return path, tokenizer


def questions():
    """Questions with a number for an answer: those to train on, and those that are held out."""
    rows = [json.loads(line) for line in (HERE / "questions.jsonl").read_text().splitlines()]
    return [r for i, r in enumerate(rows) if i % 4], rows[::4]


def prompt(row):
    return [{"role": "user", "content": row["question"]}]


def preferences(rows, every=False):
    """Pairs of answers: a brief number is preferred to what evades, and to what is long.

    Each question is in one pair, or in one with `every` worse answer.
    """
    return [
        {
            "prompt": prompt(row),
            "chosen": [{"role": "assistant", "content": f"It is {row['answer']}." if i % 2 else f"{row['answer']}."}],
            "rejected": [{"role": "assistant", "content": worse.format(**row)}],
        }
        for i, row in enumerate(rows)
        for k, worse in enumerate(WORSE)
        if every or k == i % len(WORSE)
    ]


def score(text):
    """The checkable reward, in [0, 1]: half for a number in figures, half for brevity (16 words or more get none)."""
    return 0.5 * bool(re.search(r"\d", text)) + 0.5 * max(0.0, 1 - len(text.split()) / 16)


def brief_number(completions, **_):
    """The reward in the form that TRL calls."""
    return [score(c[0]["content"]) for c in completions]


@torch.no_grad()
def answers(model, tokenizer, rows, limit=LIMIT):
    """Greedy answers to questions."""
    model.eval()
    texts = [tokenizer.apply_chat_template(prompt(r), tokenize=False, add_generation_prompt=True) for r in rows]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)  # (n, length)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=limit, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def measured(texts):
    """What a table says of answers."""
    return {
        "reward": sum(map(score, texts)) / len(texts),
        "with a number": sum(bool(re.search(r"\d", t)) for t in texts) / len(texts),
        "words": sum(len(t.split()) for t in texts) / len(texts),
    }


def report(out, before, after, curve, label, samples=()):
    """Print the table, and write it and the plot of `curve`, the value of each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    print(f"\n| held-out questions | before | after |\n|{'---|' * 3}")
    for name, value in before.items():
        print(f"| {name} | {value:.3f} | {after[name]:.3f} |")
    for question, old, new in samples:
        print(f"\n{question}\n  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot(range(1, len(curve) + 1), curve, marker="o", markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "reward.png", dpi=150)
    plt.close(figure)
    result = {"before": before, "after": after, "curve": curve, "label": label}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nadapter, result.json and reward.png are in {out}")


def settings(given, **more):
    """What all three trainers are told."""
    return {
        "output_dir": str(given.out), "max_steps": given.steps, "learning_rate": given.learning_rate,
        "per_device_train_batch_size": given.batch_size, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": given.seed, "bf16": False,
        "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False, **more,
    }  # fmt: skip


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]
