"""One training step on the meta device, and the most bytes that were alive in it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..algebra import modes

ACTIVATIONS, LOGITS, BACKWARD, GRADIENTS = "activations", "logits and loss", "workspace", "gradients"


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed.

    Attributes:
        kind: what is made now.
        alive: bytes of each kind.
        peak: `alive` when its sum was largest.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = ACTIVATIONS
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.most = self.now = 0
        self.known: dict[int, tuple[Any, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            # models ask whether rows are unpadded and not packed, to leave out a mask: a meta tensor cannot tell
            return args[0].dtype is torch.bool or 1
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.note(t)
        return out

    def note(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.ref(storage, lambda _: self.freed(key)), self.kind, size
        self.alive[self.kind] += size
        self.now += size
        if self.now > self.most:
            self.most, self.peak = self.now, self.alive.copy()

    def freed(self, key: int) -> None:
        _, kind, size = self.known.pop(key)
        self.alive[kind] -= size
        self.now -= size

    def own(self, tensors: Iterator[Tensor]) -> None:
        """Leave tensors that are counted elsewhere out of the ledger."""
        for t in tensors:
            storage = t.untyped_storage()
            self.known[storage._cdata] = storage, "", 0

    def rename(self, t: Tensor, kind: str) -> None:
        """Say what a tensor is that was made under another name."""
        key = t.untyped_storage()._cdata
        if key not in self.known:
            return
        reference, before, size = self.known[key]
        self.known[key] = reference, kind, size
        self.alive[before] -= size
        self.alive[kind] += size


class Fused(torch.autograd.Function):
    """The shapes of a fused attention: q, k, v, the output and a float32 a row are kept, and no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # (B, heads, queries, width)
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@contextmanager
def fused_attention(device: str) -> Iterator[None]:
    """Run attention as a device does, not by the sum of parts that meta tensors get.

    A CPU has no fused attention with dropout, and runs those parts too. A mode for torch functions would not do: it is off where a block is computed again in the backward.
    """
    own = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **more: Any
    ) -> Tensor:
        if query.device.type != "meta" or (device == "cpu" and dropout_p > 0):
            return own(query, key, value, attn_mask, dropout_p, **more)
        return Fused.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call,no-any-return]

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def make_batch(task: str, rows: int, tokens: int, labels: int) -> dict[str, Tensor]:
    """Ids and labels of one batch; (rows, tokens), and (rows, labels) for a model with a decoder."""
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    if task == "classification":
        return {"input_ids": ids, "labels": torch.zeros(rows, dtype=torch.long, device="meta")}
    return {"input_ids": ids, "labels": ids if labels == 0 else ids.new_zeros(rows, labels)}


@contextmanager
def accumulate_gradients(ledger: Ledger, trained: list[nn.Parameter], earlier: bool) -> Iterator[None]:
    """Count gradients as such; `earlier`: those of a micro-batch before are there from the start."""
    if earlier:
        ledger.kind = GRADIENTS
        for p in trained:
            p.grad = torch.empty_like(p)
            ledger.note(p.grad)
    ledger.kind = ACTIVATIONS

    def made(p: Tensor) -> None:
        assert p.grad is not None
        ledger.rename(p.grad, GRADIENTS)

    hooks = [p.register_post_accumulate_grad_hook(made) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p in trained:
            p.grad = None


def measure_step(
    model: Any, inputs: dict[str, Tensor], *, checkpointing: bool, accumulates: bool, device: str
) -> Counter[str]:
    """Bytes of each kind that one forward and backward hold at their peak, beside parameters and buffers.

    Args:
        model: on the meta device, with its adapter.
        inputs: what its forward takes, with labels.
        checkpointing: compute the blocks again in the backward.
        accumulates: whether gradients of an earlier batch are there.
        device: "cuda" or "cpu", whose attention is meant.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    extra = {"use_cache": False} if "use_cache" in argument_names(base) else {}
    switched = base.gradient_checkpointing_enable if checkpointing else base.gradient_checkpointing_disable
    if getattr(base, "supports_gradient_checkpointing", False):
        switched(**({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}))
    elif checkpointing:
        raise ValueError(f"{type(base).__name__} has no gradient checkpointing; plan without it")
    head = base.get_output_embeddings()
    return measure_peak(model, lambda: model(**inputs, **extra).loss, accumulates=accumulates, device=device, head=head)


def measure_peak(
    model: nn.Module, loss: Callable[[], Tensor], *, accumulates: bool, device: str, head: nn.Module | None = None
) -> Counter[str]:
    """Bytes of each kind that `loss()` and its backward hold at their peak; `head` begins what counts as logits."""
    ledger = Ledger()
    ledger.own(t for t in (*model.parameters(), *model.buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]

    def at_head(*_: object) -> None:
        ledger.kind = LOGITS

    model.train()
    with ExitStack() as stack:
        if head is not None:
            stack.callback(head.register_forward_pre_hook(at_head).remove)
        stack.enter_context(modes.shapes_only())
        stack.enter_context(accumulate_gradients(ledger, trained, accumulates))
        stack.enter_context(fused_attention(device))
        stack.enter_context(ledger)
        found = loss()
        ledger.kind = BACKWARD
        found.backward()
        del found
    return ledger.peak


def argument_names(model: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward."""
    import inspect

    return set(inspect.signature(model.forward).parameters)
