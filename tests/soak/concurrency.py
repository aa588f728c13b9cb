"""Threads that share one model: each gets what it would get alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer

THREADS = 8
PROMPTS = 6
NEW = 8  # tokens of a generation
LOW = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]

# How a thread says which adapters it wants: by a block, by row, stacked, side by side, or none of them.
Choice = tuple[str, Any]
CHOICES: list[Choice] = [
    ("use", "lora"),
    ("use", "dora"),
    ("use", "ia3"),
    ("use", "prefix"),
    ("use", "prompt"),
    ("use", ["lora", "ia3"]),
    ("use", veneer.Parallel("lora", "dora")),
    ("use", []),  # the base alone
    ("rows", ["lora", "__base__"]),
    ("rows", ["dora", "ia3"]),
    ("rows", ["oft", "lora"]),
    ("active", None),  # what is active for the model as a whole
    ("decode", "lora"),  # token by token, with a cache of its own
    ("decode", "prefix"),
    ("logits", "dora"),
]


def model_of_many() -> Any:
    """A small Llama with adapters of seven methods, none at its start."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
    base = AutoModelForCausalLM.from_config(config).eval()
    model: Any = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules="all-linear"), "lora")
    others = {
        "dora": veneer.LoraConfig(r=4, target_modules=LOW, use_dora=True),
        "ia3": veneer.IA3Config(task_type="CAUSAL_LM"),
        "oft": veneer.OFTConfig(oft_block_size=8, target_modules=LOW),
        "prefix": veneer.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prompt": veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "bottleneck": veneer.BottleneckConfig(reduction_factor=4),
    }
    for name, one in others.items():
        model.add_adapter(name, one)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((torch.randn(p.shape, generator=generator) * 0.2).to(p.dtype))
    model.set_adapter("bottleneck")
    return model.eval()


def prompts() -> list[torch.Tensor]:
    """Two rows each, of different lengths."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 128, (2, 4 + i), generator=generator) for i in range(PROMPTS)]


def one(model: Any, choice: Choice, ids: torch.Tensor) -> torch.Tensor:
    """What one call gives: logits of each new token, (tokens, 2, vocabulary)."""
    how, what = choice
    chosen = model.use_adapter(what) if how in ("use", "decode", "logits") else nullcontext()
    with torch.no_grad(), chosen:
        if how == "logits":
            whole: torch.Tensor = model(input_ids=ids).logits
            return whole.transpose(0, 1)
        if how == "decode":
            out, cache, scores = ids, None, []
            for _ in range(NEW):
                step = model(input_ids=out if cache is None else out[:, -1:], past_key_values=cache, use_cache=True)
                cache, last = step.past_key_values, step.logits[:, -1]  # (2, vocabulary)
                scores.append(last)
                out = torch.cat([out, last.argmax(-1, keepdim=True)], 1)
            return torch.stack(scores)
        more = {"adapter_names": what} if how == "rows" else {}
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **more,
        )  # fmt: skip
        return torch.stack(made.logits)


def in_threads(count: int, run: Callable[[int], None]) -> list[BaseException]:
    """Run something in threads that are switched as often as can be; returns what they raised."""
    raised: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            run(i)
        except BaseException as error:
            raised.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=3600)
    finally:
        sys.setswitchinterval(before)
    return raised


def threads_generate(size: int) -> dict[str, Any]:
    """8 threads make `size` calls each, by adapters and in ways drawn at random; all equal the serial ones bit for bit."""
    model, given = model_of_many(), prompts()
    torch.set_num_threads(1)  # what one thread computes must not depend on how many others there are
    serial = {(c, p): one(model, choice, ids) for c, choice in enumerate(CHOICES) for p, ids in enumerate(given)}
    different: list[str] = []
    worst = [0.0]

    def run(thread: int) -> None:
        draw = random.Random(thread)
        for _ in range(size):
            c, p = draw.randrange(len(CHOICES)), draw.randrange(PROMPTS)
            own, wanted = one(model, CHOICES[c], given[p]), serial[c, p]
            if not torch.equal(own, wanted):
                different.append(f"{CHOICES[c]} on prompt {p}")
                worst[0] = max(worst[0], float((own - wanted).abs().max()))

    raised = in_threads(THREADS, run)
    distinct = {tuple(t.argmax(-1).flatten().tolist()) for t in serial.values()}
    return {
        "threads": THREADS,
        "generations": THREADS * size,
        "ways": len(CHOICES),
        "distinct serial results": f"{len(distinct)} of {len(serial)}",
        "different from serial": len(different),
        "largest difference": worst[0],
        "errors": len(raised),
        "first": str(raised[0] if raised else different[0] if different else ""),
        "ok": not different and not raised,
    }


def threads_load_beside(size: int) -> dict[str, Any]:
    """4 threads generate while another one loads, activates nothing, and deletes adapters of other names."""
    model, given = model_of_many(), prompts()
    torch.set_num_threads(1)
    serial = {(c, p): one(model, choice, ids) for c, choice in enumerate(CHOICES) for p, ids in enumerate(given)}
    different: list[str] = []
    done = threading.Event()
    cycles = [0]

    def generate(thread: int) -> None:
        draw = random.Random(thread)
        for _ in range(size):
            c, p = draw.randrange(len(CHOICES)), draw.randrange(PROMPTS)
            if not torch.equal(one(model, CHOICES[c], given[p]), serial[c, p]):
                different.append(f"{CHOICES[c]} on prompt {p}")

    def load() -> None:
        while not done.is_set():
            model.add_adapter("extra", veneer.LoraConfig(r=2, target_modules="all-linear"))
            model.delete_adapter("extra")
            cycles[0] += 1

    left = [THREADS // 2]
    lock = threading.Lock()

    def run(i: int) -> None:
        if i == THREADS // 2:
            load()
            return
        try:
            generate(i)
        finally:
            with lock:
                left[0] -= 1
                if not left[0]:
                    done.set()

    raised = in_threads(THREADS // 2 + 1, run)
    return {
        "threads": THREADS // 2,
        "generations": THREADS // 2 * size,
        "loads and deletes beside": cycles[0],
        "different from serial": len(different),
        "errors": len(raised),
        "first": str(raised[0] if raised else different[0] if different else ""),
        "ok": not different and not raised and cycles[0] > 0,
    }


SCENARIOS = [
    ("threads generate", threads_generate, 200, 3, "every result equals the serial one"),
    ("threads generate beside loads", threads_load_beside, 100, 2, "every result equals the serial one"),
]
