"""What a training step keeps for its backward, in bytes that do not depend on the machine.

Each is measured twice: what autograd's graph says it saved, and what is alive after the forward of all that any
operation made in it, which also finds what a function keeps elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .figures import bench, twin
from .harness import Figure, Red
from .trio import SAID, drawn, floor, freeze_A, llama, no_dropout, pair, same_output, same_step

Run = Callable[[], Tensor]
M, K = 2048, 1024


def saved(run: Run, model: nn.Module, *given: Tensor) -> int:
    """Bytes of the distinct storages that autograd saves in `run`, but for the model's own and those of `given`."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *given)}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t  # the graph keeps it, so no address is used again

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    total = sum(found.values())
    del kept
    return total


class Made(TorchDispatchMode):
    """Notes every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = reference, storage.nbytes()
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def held(run: Run, model: nn.Module, *given: Tensor) -> int:
    """Bytes made in `run` that are still there after it, wherever they are kept, but for the model's and `given`."""
    own = {StorageWeakRef(t.untyped_storage()).cdata for t in (*model.parameters(), *model.buffers(), *given)}
    with Made() as first:  # what is made once and kept from then on, such as room that all layers use in turn
        run()
    own |= {key for key, (reference, _) in first.storages.items() if not reference.expired()}
    with Made() as made:
        kept = run()
    for key in own & made.storages.keys():  # views of them
        del made.storages[key]
    total = made.alive()
    del kept
    return total


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def slopes(build: Callable[[int], dict[str, Any]], measure: Callable[..., int], quick: bool) -> dict[str, float]:
    """Bytes a token and layer of each model: what does not grow with both is left out."""
    counts = {}
    rows, short, long = (2, 32, 64) if quick else (2, 128, 256)
    for layers in (2, 4):
        for name, model in build(layers).items():
            for tokens in (short, long):
                ids = drawn(rows, tokens)
                counts[name, layers, tokens] = measure(partial(loss_of, model, ids), model)
    return {
        n: (counts[n, 4, long] - counts[n, 4, short] - counts[n, 2, long] + counts[n, 2, short])
        / (2 * rows * (long - short))
        for n in {n for n, _, _ in counts}
    }


def kinds(layers: int) -> dict[str, Any]:
    """The bf16 models whose steps are compared, in training mode, checked against peft."""
    base = llama(512, layers, feed=3.5, groups=4, dtype=torch.bfloat16)
    models = {"frozen": floor(base), "full": twin(base).requires_grad_(True).train()}
    for kind in ("lora", "fa"):
        made = pair(base, r=16)
        for name, model in made.items():
            if kind == "fa":
                freeze_A(model)
            models[f"{name} {kind}"] = model.train()
        same_step(made, drawn(2, 32), f"saved bytes, {kind}", bar=0.1)  # bf16 through all layers
    return models


def exact(name: str, value: float, unit: str, **more: Any) -> Figure:
    return Figure(name, value, value, value, unit, **more)


@bench
def saved_bytes(quick: bool) -> list[Figure]:
    """Bytes that a bf16 step keeps for its backward, a token and layer, of LoRA and of LoRA with A frozen."""
    found = []
    where = "h=512, feed-forward 3.5 h, 8 heads on 2 keys, bf16"
    for measure, what in ((saved, "saved"), (held, "alive")):
        at = slopes(kinds, measure, quick)
        note = f"frozen {at['frozen']:,.0f}, full fine-tuning {at['full']:,.0f}; {where}, r=16; {SAID}"
        # The table shows what autograd says; both have the bar.
        rows = (
            (f"saved bytes a token and layer, {where}, r=16", "LoRA-FA saved ÷ frozen") if what == "saved" else ("", "")
        )
        found += [
            exact(f"{what} bytes a token and layer", at["veneer lora"], "bytes", bar=18_000, reference=at["peft lora"],
                  note=note, row=rows[0]),
            exact(f"LoRA-FA {what} / frozen", at["veneer fa"] / at["frozen"], "ratio", bar=1.02,
                  reference=at["peft fa"] / at["frozen"], note=f"{at['veneer fa']:,.0f} bytes a token and layer",
                  row=rows[1]),
        ]  # fmt: skip
    return found


class Linear(nn.Module):
    """A model of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


@bench
def dropout_bytes(quick: bool) -> list[Figure]:
    """Bytes that dropout of an adapter's input adds to what a linear of M tokens and K channels keeps."""
    torch.manual_seed(0)
    base, x = Linear().requires_grad_(False), torch.randn(M, K).requires_grad_()
    models = {p: pair(base, r=8, target_modules=["proj"], lora_dropout=p) for p in (0.0, 0.1)}
    for made in models.values():
        with no_dropout(*made.values()):
            same_output({**made, "base": base}, lambda m: m(x), "dropout of one linear")
    for name, model in models[0.1].items():
        if torch.equal(model(x), model(x)):
            raise Red("dropout of one linear", [f"{name}: it drops nothing"])
    found = []
    for measure, what in ((saved, "saved"), (held, "alive")):
        # x is the caller's, and alive with or without dropout
        counts = {p: {n: measure(lambda m=m: m(x), m, x) for n, m in made.items()} for p, made in models.items()}
        extra = {n: (counts[0.1][n] - counts[0.0][n]) / (M * K) for n in counts[0.0]}
        row = "dropout's extra saved bytes of a linear, M tokens × K channels, ÷ M·K" if what == "saved" else ""
        found.append(
            exact(f"dropout: extra {what} bytes / (M K)", extra["veneer"], "ratio", bar=0.125, reference=extra["peft"],
                  note=f"one linear, {M} tokens x {K} channels, fp32, p=0.1", row=row)
        )  # fmt: skip
    return found
