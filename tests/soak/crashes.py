"""Processes that are killed while they save or train: what is there afterwards is old or new, and a run goes on bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import veneer
from small import llama, lora
from veneer.io import atomic_write, locate


def forked(run: Callable[[], object], kill_after: float | None = None) -> int | None:
    """Run in a fork of this process; its exit status, or None where it was killed."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def states() -> list[Any]:
    """Two adapters of other sizes and settings, of which nothing may be mixed."""
    return [lora(r=4, lora_alpha=8, seed=1), lora(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], seed=2)]


def held(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    model = veneer.PeftModel.from_pretrained(llama(), folder)
    return model.peft_config["default"], veneer.get_peft_model_state_dict(model)


def held_of(model: Any, place: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a model's files hold where nothing went wrong."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        model.save_pretrained(folder)
        return held(Path(folder))


def same(one: tuple[Any, dict[str, torch.Tensor]], other: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    (a, x), (b, y) = one, other
    return a == b and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def kills_while_saving(count: int, seed: int = 0) -> dict[str, Any]:
    """Kill a process that saves two adapters into one folder in turn, `count` times."""
    torch.set_num_threads(1)  # a fork has none of its parent's
    rng, models = random.Random(seed), states()
    found: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = Path(made) / "adapter"
        whole = []
        for i, model in enumerate(models):
            model.save_pretrained(Path(made) / str(i))
            whole.append(held(Path(made) / str(i)))
        models[0].save_pretrained(folder)
        started = time.perf_counter()
        for _ in range(5):
            models[0].save_pretrained(folder)
        once = (time.perf_counter() - started) / 5

        def save() -> None:
            while True:
                for model in reversed(models):
                    model.save_pretrained(folder)

        for _ in range(count):
            forked(save, kill_after=rng.uniform(0, 6 * once))
            found["between the two files"] += atomic_write.pending_path(folder / locate.CONFIG_NAME).is_file()
            found["in a temporary file"] += any(folder.glob(".*.tmp"))
            try:
                now = held(folder)
            except (ValueError, OSError, UserWarning) as error:
                wrong.append(repr(error)[:300])
                continue
            which = next((name for name, w in zip(("old", "new"), whole, strict=True) if same(now, w)), None)
            found[which or "mixed"] += 1
            if which is None:
                wrong.append("neither of the two")
        models[1].save_pretrained(folder)
        if not same(held(folder), whole[1]):
            wrong.append("cannot be saved to any more")
    return {"kills": count, **dict(found), "wrong": wrong[:10], "ok": not wrong}


def trained(source: Path, out: Path, *more: str) -> None:
    from veneer.cli.app import app

    flags = {
        "--model": source / "causal", "--data": source / "pairs.jsonl", "--out": out, "--target-modules": "all-linear",
        "--r": 4, "--lora-dropout": 0.1, "--steps": 12, "--batch-size": 4, "--held-out": 8, "--eval-every": 4, "--save-every": 2,
        "--log-every": 1, "--samples": 1, "--max-new-tokens": 2, "--learning-rate": "1e-2",
    }  # fmt: skip
    app(["train", *(str(x) for pair in flags.items() for x in pair), *more], standalone_mode=False)


def kills_in_training(count: int, seed: int = 0) -> dict[str, Any]:
    """Kill a run at a random moment, go on with it until it ends, and compare the adapter's files; `count` times."""
    import datasets  # noqa: F401  (before the forks, so that most of their time is training)
    from transformers import Trainer  # noqa: F401

    import veneer.recipes.train
    import words

    torch.set_num_threads(1)
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        source, whole = Path(made) / "made", Path(made) / "whole"
        words.write_models(source)
        (source / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in words.PAIRS))
        forked(lambda: trained(source, Path(made) / "warm"))
        started = time.perf_counter()
        if forked(lambda: trained(source, whole)) != 0:
            return {"ok": False, "wrong": ["the uninterrupted run failed"]}
        lasted = time.perf_counter() - started
        names = (locate.WEIGHTS_NAME, locate.CONFIG_NAME)
        wanted = [(whole / n).read_bytes() for n in names]
        for n in range(count):
            out, how = Path(made) / str(n), ()
            for attempt in range(20):
                kill = rng.uniform(0.1, 1.0) * lasted if attempt < 2 else None  # twice, then it may end
                status = forked(lambda out=out, how=how: trained(source, out, *how), kill)
                if status == 0:
                    break
                if status is not None:
                    wrong.append(f"run {n}, attempt {attempt} with {how or 'nothing'}: exit status {status}")
                    break
                whole_ones = veneer.recipes.train.last_checkpoint(out) is not None
                if (out / "report.json").is_file():  # killed after all was written
                    break
                how = ("--resume",) if whole_ones else ("--overwrite",)
                found["resumed" if whole_ones else "killed before the first checkpoint"] += 1
            if not wrong and [(out / n).read_bytes() for n in names] != wanted:
                wrong.append(f"run {n}: other bytes")
            found["runs"] += 1
    return {**dict(found), "wrong": wrong[:10], "ok": not wrong}


SCENARIOS = [
    ("kill -9 while saving", kills_while_saving, 200, 12, "0 half adapters; old or new always loads"),
    (
        "kill -9 in training, resumed",
        kills_in_training,
        20,
        1,
        "the adapter equals the uninterrupted run's bit for bit",
    ),
]
