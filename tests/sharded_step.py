"""One of two processes: training steps of replicated (DDP) and sharded (`fully_shard`) models; prints which were right."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import veneer
from veneer.algebra import modes
from veneer.kernels import gated, linear
from veneer.recipes.launch import leave_process


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + q * k + v
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def make() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(Block(), Network(), Block())
    targets = ["q", "k", "v", "gate", "up", "down"]
    return veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def train(model: nn.Module, given: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for x in given:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    linear.SMALL = 0
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for how in ("ddp", "fsdp", "fsdp_layers"):
        check(how, rank)
        print(how, "is right")
    dist.barrier()
    leave_process()


def check(how: str, rank: int) -> None:
    """Compare steps on two ranks with those of one process that has all rows."""
    given = [torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]  # a row for each rank
    alone = make()
    with modes.reference_only():
        train(alone, given)
    model = make()
    served = 0
    runs = linear.run, gated.run

    def counted(run, *args):  # type: ignore[no-untyped-def]
        nonlocal served
        made = run(*args)
        served += made is not None
        return made

    linear.run, gated.run = (lambda *args, run=run: counted(run, *args) for run in runs)  # type: ignore[assignment]
    mesh = init_device_mesh("cpu", (2,))
    if how == "ddp":
        train(DistributedDataParallel(model), [x[rank : rank + 1] for x in given])
    else:
        base = model.get_base_model()  # type: ignore[operator]
        if how == "fsdp_layers":  # each layer gathers its own weights: no layer may read another's
            for module in base.modules():
                if isinstance(module, nn.Linear):
                    fully_shard(module, mesh=mesh)
        for block in base:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, [x[rank : rank + 1] for x in given])
    wanted = dict(alone.named_parameters())
    for name, p in model.named_parameters():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(full.detach(), wanted[name].detach(), atol=2e-5, rtol=1e-4, msg=name)
    linear.run, gated.run = runs
    assert served > 0, "no kernel took a call"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
