"""A class for each word, of a text or of a document's page; and answers that stand in a text."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..run import Run
from .base import Row, Task, class_names, classify_rows, compute_accuracy, eval_mode

BOXES = 1000  # Xu et al. 2020, arxiv.org/abs/1912.13318 (LayoutLM): a page is 1000 by 1000


class TokenClassification(Task):
    """Rows of words, a label for each, and where they stand on the page, for models of LayoutLM's kind."""

    name, auto = "token-classification", "AutoModelForTokenClassification"
    classes = True

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.words_column, run.labels_column)]

    def check(self, run: Run, rows: list[Row], source: str) -> None:
        for i, row in enumerate(rows, 1):
            words, labels, boxes = row[run.words_column], row[run.labels_column], row.get(run.boxes_column)
            if not isinstance(words, list) or not isinstance(labels, list) or not words:
                raise InputError(
                    f"data {source!r}, row {i}: {run.words_column!r} and {run.labels_column!r} must be lists, one label "
                    f"a word, not {str(words)[:40]!r} and {str(labels)[:40]!r}"
                )
            for name, values in ((run.labels_column, labels), (run.boxes_column, boxes)):
                if values is not None and len(values) != len(words):
                    raise InputError(f"data {source!r}, row {i}: {len(words)} words but {len(values)} {name}")
            for word, box in zip(words, boxes or [], strict=False):
                fits = isinstance(box, list) and len(box) == 4 and all(isinstance(v, int) for v in box)
                if not fits or not (0 <= box[0] <= box[2] <= BOXES and 0 <= box[1] <= box[3] <= BOXES):
                    raise InputError(
                        f"data {source!r}, row {i}: the box {box} of {word!r} must be [left, top, right, bottom], whole "
                        f"numbers from 0 to {BOXES} that rise; divide by the page's width and height, times {BOXES}"
                    )

    def labels(self, run: Run, train: list[Row], held_out: list[Row]) -> list[str]:
        taught, asked = ([str(x) for r in rows for x in r[run.labels_column]] for rows in (train, held_out))
        return class_names(run, taught, asked, run.labels_column)

    def encode(self, run: Run, rows: list[Row], processor: Any, labels: list[str]) -> list[Row]:
        """The first piece of a word carries its label, the others none (-100); a box goes to all pieces of its word."""
        numbers, made = {name: i for i, name in enumerate(labels)}, []
        for row in rows:
            words = [str(w) for w in row[run.words_column]]
            boxes = (
                {"boxes": row[run.boxes_column]}
                if "boxes" in list_arguments(processor) and run.boxes_column in row
                else {}
            )
            split = {} if boxes else {"is_split_into_words": True}
            found = processor(words, **boxes, **split, truncation=True, max_length=run.max_length)
            owners = found.word_ids()
            first = [w is not None and w not in owners[:t] for t, w in enumerate(owners)]
            labels_of = [
                numbers[str(row[run.labels_column][w])] if f else -100 for w, f in zip(owners, first, strict=True)
            ]
            more = {}
            if run.boxes_column in row and not boxes:
                more["bbox"] = [
                    row[run.boxes_column][w] if w is not None else [0, 0, 0, 0] for w in owners
                ]  # (tokens, 4)
            made.append({**found, **more, "labels": labels_of})
        return made

    def collator(self, run: Run, processor: object, model: object) -> Any:
        from transformers import DataCollatorForTokenClassification

        inner = DataCollatorForTokenClassification(processor)
        takes_boxes = "bbox" in forward_names(model)

        def batch(rows: list[Row]) -> Any:
            import torch

            made = inner([{k: v for k, v in r.items() if k != "bbox"} for r in rows])
            if takes_boxes and "bbox" in rows[0]:
                length = made["input_ids"].shape[1]
                none = [[0, 0, 0, 0]]
                made["bbox"] = torch.tensor([r["bbox"] + none * (length - len(r["bbox"])) for r in rows])  # (B, T, 4)
            return made

        return batch

    def metrics(self, prediction: object) -> dict[str, float]:
        return compute_accuracy(prediction)

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        """Words between spaces; where they stand on a page is not said."""
        words = text.split()
        return {run.words_column: words, run.labels_column: [labels[0]] * len(words)}

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        return [" ".join(map(str, r[run.words_column])) for r in rows]

    def answers(self, run: Run, model: Any, processor: Any, rows: list[Row]) -> list[str]:
        """Words with their classes; those of the class "O", which stands for none, are left out."""
        said = []
        for row, (logits, labels) in classify_rows(self, run, model, processor, rows):
            found = logits[labels != -100].argmax(-1).tolist()  # of the words that were not cut off
            pairs = zip(row[run.words_column], (model.config.id2label[i] for i in found), strict=False)
            said.append(" ".join(f"{w}/{label}" for w, label in pairs if label != "O"))
        return said


def list_arguments(processor: Any) -> list[str]:
    import inspect

    return list(inspect.signature(processor.__call__).parameters)


def forward_names(model: Any) -> list[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


class QuestionAnswering(Task):
    """Rows of a context, a question, and an answer that stands in the context."""

    name, auto = "question-answering", "AutoModelForQuestionAnswering"

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.context_column, run.question_column, run.answer_column)]

    def check(self, run: Run, rows: list[Row], source: str) -> None:
        for i, row in enumerate(rows, 1):
            start, text = find_answer(run, row)
            context = str(row[run.context_column])
            if not text or start < 0 or context[start : start + len(text)] != text:
                raise InputError(
                    f"data {source!r}, row {i}: the answer {text!r} does not stand in its {run.context_column!r}"
                    + (f" at character {start}" if start >= 0 else "")
                )

    def encode(self, run: Run, rows: list[Row], processor: Any, labels: list[str]) -> list[Row]:
        """Token spans of the answers; rows whose answer is cut off are left out."""
        made = []
        for row in rows:
            start, text = find_answer(run, row)
            found = processor(
                str(row[run.question_column]), str(row[run.context_column]), truncation="only_second",
                max_length=run.max_length,
            )  # fmt: skip
            first, last = (found.char_to_token(c, sequence_index=1) for c in (start, start + len(text) - 1))
            if first is not None and last is not None:
                made.append({**found, "start_positions": first, "end_positions": last})
        if not made:
            raise InputError(f"max_length={run.max_length}: no answer stands in what is left of its text; raise it")
        return made

    def collator(self, run: Run, processor: object, model: object) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Of the best span (s, e) with s <= e: the share that are the answer's, and the mean F1 over tokens.

        References:
            Rajpurkar et al. 2016, arxiv.org/abs/1606.05250 (SQuAD), section 6.1
        """
        import numpy as np

        starts, ends = prediction.predictions[:2]  # (N, T) each
        pairs = starts[:, :, None] + ends[:, None, :]  # (N, T, T)
        pairs = np.where(np.tri(pairs.shape[1], k=-1, dtype=bool), -np.inf, pairs)
        s, e = np.unravel_index(pairs.reshape(len(pairs), -1).argmax(1), pairs.shape[1:])
        first, last = prediction.label_ids
        common = np.clip(np.minimum(e, last) - np.maximum(s, first) + 1, 0, None)
        f1 = 2 * common / ((e - s + 1) + (last - first + 1))
        return {"exact_match": float(((s == first) & (e == last)).mean()), "f1": float(f1.mean())}

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        if not context:
            raise InputError("question-answering: give the text that the answer stands in with --context")
        return {run.question_column: text, run.context_column: context}

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        return [str(r[run.question_column]) for r in rows]

    def answers(self, run: Run, model: Any, processor: Any, rows: list[Row]) -> list[str]:
        """The likeliest span (s, e) of the context, s <= e, as it is written there."""
        import torch

        said = []
        for row in rows:
            question, context = str(row[run.question_column]), str(row[run.context_column])
            cut = {"truncation": "only_second", "max_length": run.max_length, "return_tensors": "pt"}
            inputs = processor(question, context, **cut)
            inside = torch.tensor([owner == 1 for owner in inputs.sequence_ids(0)])  # (T,) of the context
            with eval_mode(model):
                out = model(**{k: v.to(model.device) for k, v in inputs.items()})
            pairs = (out.start_logits[0, :, None] + out.end_logits[0]).cpu().float()  # (T, T)
            pairs = pairs.masked_fill(~(inside[:, None] & inside).triu(), -torch.inf)
            s, e = divmod(int(pairs.argmax()), pairs.shape[1])
            said.append(context[inputs.token_to_chars(s).start : inputs.token_to_chars(e).end])
        return said


def find_answer(run: Run, row: Row) -> tuple[int, str]:
    """Where an answer starts, and its text: {"text": [...], "answer_start": [...]}, or a text that is looked for."""
    given = row[run.answer_column]
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
        text = texts[0] if isinstance(texts, list) and texts else texts
        start = starts[0] if isinstance(starts, list) and starts else starts
    else:
        text, start = given, row.get("answer_start")
    text = str(text or "")
    return (int(start) if isinstance(start, int) else str(row[run.context_column]).find(text)), text
