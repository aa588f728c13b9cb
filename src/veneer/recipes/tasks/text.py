"""Text to text, and text to a class."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..run import Run
from .base import OneClass, Row, Task


class Generation(Task):
    """What causal and encoder-decoder models have in common."""

    by_token = True

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        return {run.prompt_column: text}

    def collator(self, run: Run, processor: object, model: object) -> Any:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(processor, padding=True)

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        return [prompt_text(run.chat, str(r[run.prompt_column]), processor) for r in rows if run.prompt_column in r]

    def answers(self, run: Run, model: object, processor: object, rows: list[Row]) -> list[str]:
        from .base import complete_prompts

        return complete_prompts(model, processor, self.asked(run, rows, processor), run.max_new_tokens)

    def check(self, run: Run, rows: list[Row], source: str) -> None:
        if self.scored(run) and not all(c in rows[0] for c in (run.prompt_column, run.completion_column)):
            raise InputError(
                f"evaluate='generate' compares what is generated with a column {run.completion_column!r}, and data "
                f"{source!r} has only {', '.join(map(repr, rows[0]))}; leave evaluate out"
            )

    def scored(self, run: Run) -> bool:
        return run.evaluate == "generate"

    def scores(self, run: Run, rows: list[Row], answers: list[str]) -> dict[str, float]:
        """Share of answers that are the completion, but for white space and case."""
        said = [" ".join(a.lower().split()) for a in answers]
        right = [" ".join(str(r[run.completion_column]).lower().split()) for r in rows]
        return {"eval_exact_match": sum(a == b for a, b in zip(said, right, strict=True)) / len(right)}


def keep_learnable(run: Run, made: list[Row]) -> list[Row]:
    """The rows that have something to learn.

    Raises:
        InputError: there are none.
    """
    found = [m for m in made if any(t != -100 for t in m["labels"])]
    if not found:
        raise InputError(
            f"max_length={run.max_length}: prompts alone are longer, so nothing is left to learn; raise it"
        )
    return found


class CausalLM(Generation):
    """Rows of a prompt and a completion, or of plain text."""

    name, auto = "causal-lm", "AutoModelForCausalLM"

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.prompt_column, run.completion_column), (run.text_column,)]

    def encode(self, run: Run, rows: list[Row], processor: Any, labels: list[str]) -> list[Row]:
        made = []
        for row in rows:
            if run.prompt_column in row and run.completion_column in row:
                made.append(
                    encode_completion(run, str(row[run.prompt_column]), str(row[run.completion_column]), processor)
                )
            else:
                text = str(row[run.text_column])
                ids = processor(text, truncation=True, max_length=run.max_length)["input_ids"]
                made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})
        return keep_learnable(run, made)


def encode_completion(run: Run, prompt: str, text: str, tokenizer: Any) -> Row:
    """One prompt with its completion, for a causal model; prompts carry no loss (-100)."""
    head = tokenizer(prompt_text(run.chat, prompt, tokenizer), add_special_tokens=not run.chat)["input_ids"]
    tail = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        if head and head[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            head = head[:-1]
        tail = [*tail, tokenizer.eos_token_id]
    ids = (head + tail)[: run.max_length]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": ([-100] * len(head) + tail)[: run.max_length],
    }


class Seq2SeqLM(Generation):
    """Rows of a prompt and a completion."""

    name, auto = "seq2seq-lm", "AutoModelForSeq2SeqLM"

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.prompt_column, run.completion_column)]

    def encode(self, run: Run, rows: list[Row], processor: Any, labels: list[str]) -> list[Row]:
        cut, made = {"truncation": True, "max_length": run.max_length}, []
        end = processor.eos_token_id
        for row in rows:
            target = processor(text_target=str(row[run.completion_column]), **cut)["input_ids"]
            if end is not None and end not in target and len(target) < run.max_length:
                target = [*target, end]  # some tokenizers end no text; without an end, generation would not stop
            made.append({**processor(str(row[run.prompt_column]), **cut), "labels": target})
        return keep_learnable(run, made)


def prompt_text(chat: bool, prompt: str, tokenizer: Any) -> str:
    """A prompt as the model sees it."""
    if not chat:
        return prompt
    if not tokenizer.chat_template:
        raise InputError("chat=True: the model's tokenizer has no chat template; leave chat out")
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Classification(OneClass):
    """Rows of a text and its class."""

    name, auto = "classification", "AutoModelForSequenceClassification"

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.text_column, run.label_column)]

    def encode(self, run: Run, rows: list[Row], processor: Any, labels: list[str]) -> list[Row]:
        cut, numbers = {"truncation": True, "max_length": run.max_length}, {name: i for i, name in enumerate(labels)}
        return [
            {**processor(str(r[run.text_column]), **cut), "labels": numbers[str(r[run.label_column])]} for r in rows
        ]

    def collator(self, run: Run, processor: object, model: object) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        return {run.text_column: text, run.label_column: labels[0]}

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        return [str(r[run.text_column]) for r in rows]
