"""What is measured on a GPU, at the shapes of Llama-3-8B's layers in bfloat16. Nothing, and no figures, without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from veneer.kernels import linear, member
from veneer.kernels import triton as kernels

from .figures import bench, median, relative
from .harness import Figure, Worst, figure, interleaved, ratio, require
from .trio import beside, floor, pair, same_step, step

LLAMA3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA3_8B |= {"num_hidden_layers": 4, "vocab_size": 4096}  # the layers' shapes; a small head, for it is the same in all
R, TOKENS = 16, 4096
NEAR = 0.03  # of the largest entry: some roundings to bfloat16, in another order

Run = Callable[[], Any]


def gpu() -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda")
    print("      no GPU: nothing is measured")
    return None


def waited(run: Run, times: int = 1) -> None:
    """Run, and wait until the device is done."""
    for _ in range(times):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@bench
def gpu_step(quick: bool) -> list[Figure]:
    """On a GPU: time and peak memory of a LoRA step at Llama-3-8B's shapes in bfloat16, against peft."""
    device = gpu()
    if device is None:
        return []
    return step_figures({**LLAMA3_8B, "num_hidden_layers": 1 if quick else 4}, TOKENS, device, 3 if quick else 15)


def step_figures(sizes: dict[str, Any], tokens: int, device: torch.device, rounds: int) -> list[Figure]:
    torch.manual_seed(0)
    with device:
        ids = torch.randint(0, sizes["vocab_size"], (1, tokens))
        base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).requires_grad_(False)
    models = {"floor": floor(base), **pair(base, r=R)}  # one set of weights, so a peak is what one model would need
    for model in models.values():
        model.train()
    same_step(models, ids, "GPU", 2 * NEAR)
    taken = interleaved({n: partial(waited, partial(step, m, ids)) for n, m in models.items()}, rounds, warmup=3)
    note = f"r={R}, {tokens} tokens, {sizes['num_hidden_layers']} layers, bf16, no optimizer; "
    note += f"frozen floor {median(taken['floor']):.3g} s"
    found = [
        ratio("GPU: LoRA step / peft's", taken["veneer"], taken["peft"], bar=0.6, note=note),
        beside("GPU: LoRA step / frozen floor", taken, "floor", note=note),
    ]
    if device.type == "cuda":
        peaks = {name: peak(partial(step, model, ids), device) for name, model in models.items()}
        note = f"bytes allocated at the most, weights too; frozen floor {peaks['floor'] / 2**30:.2f} GiB"
        found.append(
            figure("GPU: LoRA peak / peft's", [peaks["veneer"] / peaks["peft"]], "ratio", bar=0.7, note=note)
        )  # fmt: skip
    return found


def peak(run: Run, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    waited(run)
    return torch.cuda.max_memory_allocated(device)


@bench
def gpu_kernels(quick: bool) -> list[Figure]:
    """On a GPU: the Triton kernels against PyTorch's own operations, at Llama-3-8B's shapes in bfloat16."""
    device = gpu()
    if device is None:
        return []
    if not kernels.is_available(torch.zeros(1, device=device)):
        print("      triton is not installed: nothing is measured")
        return []
    return kernel_figures(TOKENS, 4096, 14336, device, 5 if quick else 25)


def kernel_figures(M: int, K: int, N: int, device: torch.device, rounds: int, times: int = 20) -> list[Figure]:
    found = []
    for name, ours, theirs in kernel_runs(M, K, N, device):
        taken = interleaved(
            {"ours": partial(waited, ours, times), "torch": partial(waited, theirs, times)}, rounds, warmup=3
        )
        note = f"{M} tokens, {K} to {N}, r={R}, bf16; PyTorch {median(taken['torch']) / times * 1e6:.3g} us"
        found.append(ratio(f"GPU: {name} / PyTorch", taken["ours"], taken["torch"], bar=1.0, note=note))
    return found


def kernel_runs(M: int, K: int, N: int, device: torch.device) -> Iterator[tuple[str, Run, Run]]:
    """Each kernel and what PyTorch does in its place, after both were found to agree."""
    torch.manual_seed(0)
    with device:
        x, y, e, g, dm = (torch.randn(M, n).bfloat16() for n in (K, N, N, N, N))
        A, B, S = torch.randn(R, K) / K**0.5, torch.randn(N, R), 32
        W = torch.randn(N, K).bfloat16() / K**0.5
        As, Bs, scales = torch.randn(S, R, K) / K**0.5, torch.randn(S, N, R), torch.rand(S)
        h, p = torch.randn(M, R).bfloat16(), 0.1
    A16, B16, As16, Bs16 = (
        t.bfloat16() for t in (A, B, As, Bs * scales[:, None, None])
    )  # PyTorch gets its copies for nothing

    def same(name: str, mine: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        worst = Worst()
        for i, (one, other) in enumerate(zip(mine, wanted, strict=True)):
            worst.add(relative(one.float(), other.float()), f"tensor {i}")
        require([worst.figure(f"{name} against PyTorch, relative", NEAR)])

    same("shrink", (kernels.shrink_dropped(x, A),), (F.linear(x, A16),))
    yield "shrink", partial(kernels.shrink_dropped, x, A), partial(F.linear, x, A16)

    same("expand-add", (kernels.expand_add_(y.clone(), h, B, 0.5),), (y.addmm(h, B16.T, alpha=0.5),))
    yield "expand-add", partial(kernels.expand_add_, y, h, B, 1e-3), partial(y.addmm_, h, B16.T, alpha=1e-3)

    for rows, kept in ((min(S, M), "a token each"), (M, "all tokens")):
        slots = (torch.arange(rows, device=device) * S // rows).int()  # in runs, as rows of a batch are
        routing, own = kernels.route_rows(slots, S), slots.long()
        few, out = x[:rows], y[:rows].clone()

        def gathered(out: Tensor = out, few: Tensor = few, own: Tensor = own) -> Tensor:
            return out.add_(torch.bmm(Bs16[own], torch.bmm(As16[own], few[:, :, None]))[:, :, 0])

        def grouped(out: Tensor = out, few: Tensor = few) -> Tensor:
            return out.add_(torch.bmm(torch.bmm(few.view(S, -1, K), As16.mT), Bs16.mT).view(-1, N))

        plain = gathered if rows <= S else grouped

        def routed(out: Tensor = out, few: Tensor = few, routing: Any = routing) -> Tensor:
            return kernels.routed_add_(out, few, As, Bs, scales, routing)

        same(f"{S} adapters, {kept}", (routed(out.clone()),), (plain(out.clone()),))
        yield f"{S} adapters, {kept}", routed, plain

    def gate(e: Tensor, g: Tensor) -> Tensor:
        return F.silu(e) * g

    def backward() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (e, g)]
            m = gate(*leaves)
        return *torch.autograd.grad(m, leaves, dm), m

    same("gate", (kernels.gate_forward(e, g),), (gate(e, g),))
    yield "gated MLP, forward", partial(kernels.gate_forward, e, g), partial(gate, e, g)
    same("gate, backward", kernels.gate_backward_(dm.clone(), e, g), backward())
    yield "gated MLP, backward", partial(kernels.gate_backward_, dm.clone(), e, g), backward

    leaves = [x.requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    share = member.Share(W, None, A, B, None, 0.5, p)

    def fused() -> tuple[Tensor, ...]:
        (out,) = linear.run(x, (share,))  # type: ignore[misc]
        return torch.autograd.grad(out, leaves, dm)

    def composed(mask: Tensor | None = None) -> tuple[Tensor, ...]:
        dropped = F.dropout(x, p) if mask is None else x * mask
        out = F.linear(x, W) + F.linear(F.linear(dropped, A.bfloat16()), B.bfloat16()) * 0.5
        return torch.autograd.grad(out, leaves, dm)

    torch.manual_seed(1)
    found = fused()
    torch.manual_seed(1)
    seed, ones = kernels.draw_seed(device), (h.new_ones(M, 1), h.new_ones(K, 1))
    mask = kernels.expand_add_(x.new_zeros(M, K), *ones, p=p, seed=seed).detach()
    same("LoRA with dropout", found, composed(mask))
    yield "linear with LoRA and dropout, forward and backward", fused, composed
