"""Where the bytes of a step lie for each way of sharing it between processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .ledger import ACTIVATIONS, BACKWARD, GRADIENTS, LOGITS
from .settings import OPTIMIZERS, Settings

# What libraries hold whatever the model is. Each is named in the plan that uses it.
CONTEXT = 500_000_000  # CUDA's context and libraries' kernels on the card, outside of PyTorch's allocator
LOOSE = 0.05  # of what comes and goes in a step, lost between the allocator's blocks
HOST = 3_000_000_000  # resident memory of a process that trains on a GPU: Python, PyTorch, CUDA's libraries, data
BUCKET = 500_000_000  # numbers in DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000  # numbers in DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Part:
    """One line of an account: bytes, and what they are made of."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Peak:
    """The most memory of one process.

    Attributes:
        layout: how processes share the work.
        parts: what is on the device at the peak.
        outside: what the device holds beside PyTorch's allocator.
        host_parts: what is in host memory.
    """

    layout: str
    parts: tuple[Part, ...]
    outside: tuple[Part, ...] = ()
    host_parts: tuple[Part, ...] = ()

    @property
    def device(self) -> int:
        """Bytes of PyTorch's allocator, as torch.cuda.max_memory_allocated counts them."""
        return sum(p.bytes for p in self.parts)

    @property
    def card(self) -> int:
        """Bytes that the device must have."""
        return self.device + sum(p.bytes for p in self.outside)

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return sum(p.bytes for p in self.host_parts)


@dataclass
class Counted:
    """What was counted of a model, its adapter and one step, in bytes where nothing else is said."""

    frozen: int = 0
    trained: int = 0
    trained_numbers: int = 0
    all_numbers: int = 0
    buffers: int = 0
    largest: int = 0  # parameter
    block: int = 0  # the largest transformer block
    outside_blocks: int = 0
    itemsize: int = 4  # of the dtype
    dequantized: int = 0  # the largest quantized weight, in the computation's dtype
    step: Counter[str] = field(default_factory=Counter)


def compute_peak(c: Counted, s: Settings) -> Peak:
    """The peak of one of `s.processes` equal processes."""
    n, offload = s.processes, s.offload is not None
    state = int(c.trained_numbers * OPTIMIZERS[s.optimizer])
    stay: list[Part] = []  # on the device all the time
    host: list[Part] = []
    gathered: list[Part] = []  # while the step runs
    where = host if offload else stay
    share = f"1/{n} of " if n > 1 else ""
    gradients, waiting = c.trained, c.trained
    if s.zero == 3 or s.fsdp:
        where.append(Part("frozen weights", c.frozen // n, f"{share}{label_storage(s)}"))
        where.append(Part("trained weights", c.trained // n, f"{share}kept in float32 where it is an adapter"))
        where.append(Part("optimizer state", state // n, f"{share}{s.optimizer}"))
        gradients = waiting = c.trained // n
        if s.zero == 3:
            where.append(Part("optimizer's copy", 4 * c.trained_numbers // n, f"{share}DeepSpeed's own float32 copy"))
            where.append(Part("gradient shards", c.trained // n, f"{share}what was reduced"))
            stay.append(Part("reduce bucket", BUCKET * c.itemsize, "DeepSpeed's reduce_bucket_size of 5e8 numbers"))
            if n > 1 or offload:
                whole = c.largest + (c.largest // n if offload else 0)
                live = min(c.frozen + c.trained, LIVE * c.itemsize + whole)
                note = "stage3_max_live_parameters of 1e9 numbers, and the largest parameter" + (
                    " with the shard that it is gathered from" if offload else ""
                )
                gathered.append(Part("gathered weights", live, note))
            waiting = 0
        else:
            note = "the largest block: in use, prefetched, and the buffer it is gathered in; all outside of blocks"
            whole = c.outside_blocks + 3 * c.block
            gathered.append(
                Part("gathered weights", min(whole, 3 * (c.frozen + c.trained)) if n > 1 or offload else 0, note)
            )
            if offload:
                host.append(Part("gradient shards", c.trained // n, f"{share}what was reduced"))
                waiting = 0
    else:
        stay.append(Part("frozen weights", c.frozen, label_storage(s)))
        stay.append(Part("trained weights", c.trained, "kept in float32 where it is an adapter"))
        if s.zero == 2:
            where.append(Part("optimizer state", state // n, f"{share}{s.optimizer}"))
            where.append(Part("optimizer's copy", 4 * c.trained_numbers // n, f"{share}DeepSpeed's own float32 copy"))
            where.append(Part("gradient shards", c.trained // n, f"{share}what was reduced"))
            stay.append(Part("reduce bucket", BUCKET * c.itemsize, "DeepSpeed's reduce_bucket_size of 5e8 numbers"))
            waiting = 0
        else:
            stay.append(
                Part("optimizer state", state, f"{s.optimizer}: {OPTIMIZERS[s.optimizer]:g} bytes a trained number")
            )
            if n > 1:
                stay.append(Part("DDP's buckets", c.trained, "a copy of all gradients"))
    if c.buffers:
        stay.append(Part("buffers", c.buffers))
    step = dict(c.step)
    seen = step.pop(GRADIENTS, 0)
    running = [
        Part(GRADIENTS, min(seen, gradients) if s.fsdp else seen, "those there are at the peak"),
        Part(ACTIVATIONS, step.get(ACTIVATIONS, 0), label_activations(s)),
        Part(LOGITS, step.get(LOGITS, 0), "logits, their float32 copy and log-probabilities"),
        Part(BACKWARD, step.get(BACKWARD, 0), "gradients of activations, what is computed again, products' results"),
        *gathered,
    ]
    if c.dequantized:
        running.append(Part("dequantized weight", c.dequantized, f"the largest one, in {s.dtype}"))
    updating = [Part(GRADIENTS, waiting, "of all trained weights; the peak is in the optimizer's step")]
    moment = max(running, updating, key=lambda parts: sum(p.bytes for p in parts))
    parts = tuple(p for p in (*stay, *moment) if p.bytes)
    if s.device == "cpu":
        return Peak(s.layout, parts)
    come = sum(p.bytes for p in moment)
    outside = (
        Part("CUDA context", CONTEXT, "assumed; kernels and libraries, not PyTorch's allocator"),
        Part("between blocks", int(LOOSE * come), f"assumed; {LOOSE:.0%} of what comes and goes"),
    )
    base = Part("process", HOST, "assumed; Python, PyTorch and CUDA's libraries, resident")
    return Peak(s.layout, parts, outside, (base, *(p for p in host if p.bytes)))


def label_storage(s: Settings) -> str:
    return f"{s.quantize} linear layers, the rest {s.dtype}" if s.quantize else s.dtype


def label_activations(s: Settings) -> str:
    how = "inputs of blocks, which are computed again" if s.gradient_checkpointing else "what autograd keeps"
    return f"{how}: {s.batch_size} x {s.length} tokens"
