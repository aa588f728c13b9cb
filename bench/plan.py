"""Predicted against measured peaks: resident memory of a fresh process that trains on a CPU.

    python -m bench.plan            every row
    python -m bench.plan --one ...  one row, as a subprocess of the above

What is measured is the kernel's high-water mark of resident memory (VmHWM) over three training steps, less what was
resident before the model was loaded. The allocator is told to map every large block by itself and give it back at once,
so that the figure is of what is alive and not of what malloc keeps for later.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("smollm2-135m", "minilm-l6-v2")
SHAPES = ((4, 64), (8, 128))
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STEPS = 3


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def one(name: str, rows: int, tokens: int, dtype: str, checkpointing: bool) -> int:
    """Train in this process; bytes of its peak that the model and its steps brought."""
    import torch
    import transformers
    from transformers import AutoConfig

    from veneer.cli.models import AUTO, load_model, locate

    torch.set_num_threads(1)
    task = "classification" if name.startswith("minilm") else "causal-lm"
    # The libraries start in a small model of the same kind, and not in what is measured.
    config = AutoConfig.from_pretrained(locate(name), num_hidden_layers=1, vocab_size=1024)
    config.pad_token_id = config.pad_token_id or 0
    small = getattr(transformers, AUTO[task]).from_config(config, dtype=getattr(torch, dtype))
    # In a thread of its own, whose scratch memory goes with it.
    thread = threading.Thread(target=train, args=(small, task, rows, tokens, checkpointing))
    thread.start()
    thread.join()
    del small, thread
    gc.collect()
    before = resident("VmRSS")
    base = load_model(name, task, dtype)
    base.config.pad_token_id = base.config.pad_token_id or 0
    for p in base.parameters():  # out of the file's pages, which come and go as the system likes
        p.data = p.data.clone()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: loading is not training
    train(base, task, rows, tokens, checkpointing)
    return resident("VmHWM") - before


def train(base: Any, task: str, rows: int, tokens: int, checkpointing: bool) -> None:
    """Some steps of LoRA on all linears."""
    import torch

    import veneer

    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=8, target_modules="all-linear", task_type=TASK[task]))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(100, 1000, (rows, tokens))
    labels = ids if task == "causal-lm" else torch.zeros(rows, dtype=torch.long)
    extra = {"use_cache": False} if task == "causal-lm" else {}
    for _ in range(STEPS):
        model(input_ids=ids, labels=labels, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


TASK = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


def measured(name: str, rows: int, tokens: int, dtype: str, checkpointing: bool, timeout: float = 300) -> int:
    """`one` in a fresh process."""
    given = [name, str(rows), str(tokens), dtype, str(int(checkpointing))]
    where = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", "--one", *given], env=os.environ | MALLOC | where, capture_output=True,
        text=True, timeout=timeout, check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: the measured process failed: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def predicted(name: str, rows: int, tokens: int, dtype: str, checkpointing: bool) -> Any:
    """The plan for the same step."""
    import veneer

    config = veneer.LoraConfig(r=8, target_modules="all-linear")
    return veneer.plan(
        name, config, batch_size=rows, length=tokens, dtype=dtype, gradient_checkpointing=checkpointing, device="cpu"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=5, metavar=("MODEL", "ROWS", "TOKENS", "DTYPE", "CHECKPOINTING"))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    if given.one:
        name, rows, tokens, dtype, checkpointing = given.one
        print(json.dumps(one(name, int(rows), int(tokens), dtype, checkpointing == "1")))
        return
    print("| model | rows x tokens | dtype | checkpointing | predicted MB | measured MB | difference |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for name in MODELS:
        for rows, tokens in SHAPES:
            for dtype in ("float32", "bfloat16"):
                for checkpointing in (False, True):
                    case = (name, rows, tokens, dtype, checkpointing)
                    said, was = predicted(*case).peak.device, measured(*case)
                    found.append({"case": case, "predicted": said, "measured": was})
                    print(
                        f"| {name} | {rows} x {tokens} | {dtype} | {'yes' if checkpointing else 'no'} | {said / 1e6:.0f} | "
                        f"{was / 1e6:.0f} | {said / was - 1:+.1%} |", flush=True,
                    )  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
