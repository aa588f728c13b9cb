"""Predicted against measured peaks: resident memory of a fresh process that trains on a CPU.

    python -m bench.plan            every row
    python -m bench.plan --one ...  one row, as a subprocess of the above

What is measured is the kernel's high-water mark of resident memory (VmHWM) over three training steps, less what was
resident before the model was loaded. The allocator is told to map every large block by itself and give it back at once,
so that the figure is of what is alive and not of what malloc keeps for later.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import socket
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


def one(name: str, rows: int, tokens: int, dtype: str, checkpointing: bool, layout: str = "one") -> int:
    """Train in this process; bytes of its peak that the model and its steps brought."""
    import torch
    import transformers
    from transformers import AutoConfig

    from veneer.recipes.models import find_model
    from veneer.recipes.tasks import TASKS

    torch.set_num_threads(1)
    if layout != "one":
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    task = "classification" if name.startswith("minilm") else "causal-lm"
    # The libraries start in a small model of the same kind, and not in what is measured.
    config = AutoConfig.from_pretrained(find_model(name), num_hidden_layers=1, vocab_size=1024)
    config.pad_token_id = config.pad_token_id or 0
    small = getattr(transformers, TASKS[task].auto).from_config(config, dtype=getattr(torch, dtype))
    # In a thread of its own, whose scratch memory goes with it.
    thread = threading.Thread(target=train, args=(small, task, rows, tokens, checkpointing, layout))
    thread.start()
    thread.join()
    del small, thread
    gc.collect()
    before = resident("VmRSS")
    base = TASKS[task].load_model(name, dtype)
    base.config.pad_token_id = base.config.pad_token_id or 0
    for p in base.parameters():  # out of the file's pages, which come and go as the system likes
        p.data = p.data.clone()
    gc.collect()
    train(base, task, rows, tokens, checkpointing, layout)
    peak = resident("VmHWM") - before
    if layout != "one":
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return peak


def train(base: Any, task: str, rows: int, tokens: int, checkpointing: bool, layout: str) -> None:
    """Some steps of LoRA on all linears."""
    import torch

    import veneer

    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=8, target_modules="all-linear", task_type=TASK[task]))
    model.train()
    called: Any = model
    if layout == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in base.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout == "ddp":
        called = torch.nn.parallel.DistributedDataParallel(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: loading is not training
    # PyTorch has no fused step for shards on a CPU
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=layout != "fsdp")
    ids = torch.randint(100, 1000, (rows, tokens))
    labels = ids if task == "causal-lm" else torch.zeros(rows, dtype=torch.long)
    extra = {"use_cache": False} if task == "causal-lm" else {}
    for _ in range(STEPS):
        called(input_ids=ids, labels=labels, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


TASK = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


def measured(
    name: str, rows: int, tokens: int, dtype: str, checkpointing: bool, layout: str = "one", timeout: float = 300
) -> int:
    """`one` in a fresh process, or in two; of those the first one's peak."""
    given = [name, str(rows), str(tokens), dtype, str(int(checkpointing)), layout]
    where = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    count = 1 if layout == "one" else 2
    started = []
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "WORLD_SIZE": str(count)}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "bench.plan", "--one", *given], env=os.environ | MALLOC | where | own,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                )
            )  # fmt: skip
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, error) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"{name}: the measured process failed: {error[-2000:]}")
    return int(json.loads(said[0][0].splitlines()[-1]))


def predicted(name: str, rows: int, tokens: int, dtype: str, checkpointing: bool, layout: str = "one") -> Any:
    """The plan for the same step."""
    import veneer

    config = veneer.LoraConfig(r=8, target_modules="all-linear")
    return veneer.plan(
        name, config, batch_size=rows, length=tokens, dtype=dtype, gradient_checkpointing=checkpointing, device="cpu",
        processes=1 if layout == "one" else 2, fsdp=layout == "fsdp",
    )  # fmt: skip


CASES = [
    (name, rows, tokens, dtype, checkpointing, "one")
    for name in MODELS for rows, tokens in SHAPES for dtype in ("float32", "bfloat16") for checkpointing in (False, True)
]  # fmt: skip
CASES += [("smollm2-135m", 4, 64, "float32", False, layout) for layout in ("ddp", "fsdp")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=6, metavar=("MODEL", "ROWS", "TOKENS", "DTYPE", "CHECKPOINTING", "LAYOUT"))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    if given.one:
        name, rows, tokens, dtype, checkpointing, layout = given.one
        print(json.dumps(one(name, int(rows), int(tokens), dtype, checkpointing == "1", layout)))
        return
    print("| model | rows x tokens | dtype | checkpointing | processes | predicted MB | measured MB | difference |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for case in CASES:
        name, rows, tokens, dtype, checkpointing, layout = case
        said, was = predicted(*case).peak.device, measured(*case)
        found.append({"case": case, "predicted": said, "measured": was})
        print(
            f"| {name} | {rows} x {tokens} | {dtype} | {'yes' if checkpointing else 'no'} | "
            f"{'1' if layout == 'one' else f'2, {layout}'} | {said / 1e6:.0f} | {was / 1e6:.0f} | {said / was - 1:+.1%} |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
