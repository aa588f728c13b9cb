"""The frozen floor, peft and Veneer on one set of base weights, and what it takes to compare them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from .figures import LIBRARIES, Bench, bench, median, relative, tensors, threads, twin
from .harness import Figure, Red, Worst, ratio, require

VOCABULARY = 1024
HEAD = 64
SAID = f"random Llama, vocabulary {VOCABULARY}, heads of {HEAD}"


def timed(function: Bench) -> Bench:
    """Register a measurement on two threads."""

    @functools.wraps(function)
    def on_two(quick: bool) -> list[Figure]:
        with threads(2):
            return function(quick)

    return bench(on_two)


def llama(hidden: int, layers: int, *, feed: float = 2.75, groups: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A random Llama, frozen; `feed` times `hidden` wide in its MLPs, `groups` query heads to a key head."""
    sizes = {"hidden_size": hidden, "intermediate_size": int(feed * hidden), "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": hidden // HEAD, "num_key_value_heads": hidden // HEAD // groups}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=VOCABULARY)).to(dtype)
    return made.requires_grad_(False).eval()


def drawn(rows: int, tokens: int) -> Tensor:
    """Token ids (rows, tokens)."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))


def floor(base: Any) -> Any:
    """The frozen model with gradients at its input: what a step costs that has to reach every layer."""
    made = twin(base).train()
    made.enable_input_require_grads()
    return made


def pair(base: nn.Module, adapters: tuple[str, ...] = ("default",), **options: Any) -> dict[str, Any]:
    """The same LoRA, off its start, in both libraries on the weights of `base`."""
    options = {"target_modules": "all-linear", **options}
    models: dict[str, Any] = {}
    for name, library in LIBRARIES.items():
        model = library.get_peft_model(twin(base), library.LoraConfig(**options), adapters[0])
        for adapter in adapters[1:]:
            model.add_adapter(adapter, library.LoraConfig(**options))
        models[name] = model
    for seed, adapter in enumerate(adapters, 1):
        mine, theirs = (dict(tensors(n, m, adapter)) for n, m in models.items())
        if mine.keys() != theirs.keys() or not mine:
            raise Red("same adapters", [f"{k}: in one of the two" for k in sorted(mine.keys() ^ theirs.keys())[:8]])
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for key, tensor in mine.items():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.02)
                theirs[key].copy_(tensor)
    return models


def freeze_A(model: nn.Module) -> None:
    """LoRA-FA: train B only."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def step(model: Any, ids: Tensor) -> None:
    """Forward, backward, and the gradients dropped."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def same_step(models: dict[str, Any], ids: Tensor, where: str, bar: float = 1e-4, adapter: str = "default") -> None:
    """Red unless outputs and gradients of one step are peft's, relative to their size."""
    found = {}
    for name in LIBRARIES:
        found[name] = models[name](input_ids=ids, labels=ids, use_cache=False)
        found[name].loss.backward()
    worst = Worst()
    worst.add(relative(found["veneer"].logits, found["peft"].logits), "logits")
    same_gradients(models, worst, adapter)
    require([worst.figure(f"{where}: a step against peft, relative", bar)])
    for name in LIBRARIES:
        models[name].zero_grad(set_to_none=True)


def same_gradients(models: dict[str, Any], worst: Worst, adapter: str = "default") -> None:
    """Add what the gradients of the adapter differ by; Red where one library has one and the other has none."""
    mine, theirs = (dict(tensors(n, models[n], adapter)) for n in LIBRARIES)
    compared = 0
    for key, tensor in theirs.items():
        own, other = mine[key].grad, tensor.grad
        if own is None or other is None:
            if own is not other:
                raise Red("gradients", [f"{key}: one of the two libraries has none"])
            continue
        worst.add(relative(own, other), key)
        compared += 1
    if not compared:
        raise Red("gradients", ["neither library has any"])


def same_output(models: dict[str, Any], run: Callable[[Any], Tensor], where: str, bar: float = 1e-4) -> None:
    """Red unless the outputs are peft's, relative to their size, and not the base model's."""
    with torch.no_grad():
        mine, theirs, plain = (run(models[n]) for n in ("veneer", "peft", "base"))
    worst = Worst()
    worst.add(relative(mine, theirs), "outputs")
    require([worst.figure(f"{where}: outputs against peft, relative", bar)])
    if relative(plain, theirs) < 10 * bar:
        raise Red(where, ["the adapters make no difference, so nothing is compared"])


def beside(name: str, taken: dict[str, list[float]], below: str | tuple[str, str], **more: Any) -> Figure:
    """The ratio of Veneer's times to those of `below`, with peft's; or to one of `below` for each of the two."""
    mine, theirs = (below, below) if isinstance(below, str) else below
    ours = more.pop("ours", "veneer")
    others = more.pop("theirs", "peft")
    reference = median([a / b for a, b in zip(taken[others], taken[theirs], strict=True)])
    return ratio(name, taken[ours], taken[mine], reference=reference, **more)


@contextlib.contextmanager
def no_dropout(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode within the block, then in train mode."""
    for model in models:
        model.eval()
    yield
    for model in models:
        model.train()
