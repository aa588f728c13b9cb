"""Block-diagonal operators, and the matrices of grouped convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Operator


class BlockDiagonal(Operator):
    """blkdiag(M_1 ... M_n) for blocks (n, b, b).

    Args:
        count: n, if blocks is (1, b, b) and that one block is repeated.
        skip: probability, for each block, of being the identity in a training step.
    """

    def __init__(self, blocks: Tensor, *, count: int | None = None, skip: float = 0.0) -> None:
        self.blocks, self.skip = blocks, skip
        self.count = blocks.shape[0] if count is None else count

    @property
    def all_blocks(self) -> Tensor:
        """(n, b, b), a view if one block is repeated."""
        return self.blocks.expand(self.count, -1, -1)

    @property
    def alike(self) -> bool:
        """One block, repeated."""
        return self.blocks.shape[0] == 1

    def sample(self) -> Operator:
        if not self.skip:
            return self
        b = self.blocks.shape[-1]
        keep = torch.rand(self.count, 1, 1, device=self.blocks.device) >= self.skip
        eye = torch.eye(b, dtype=self.blocks.dtype, device=self.blocks.device)
        return BlockDiagonal(torch.where(keep, self.blocks, eye))

    def apply(self, x: Tensor) -> Tensor:
        return self.times(x, self.blocks.to(x.dtype).transpose(1, 2))

    def dense(self) -> Tensor:
        return block_diagonal(self.all_blocks)

    def rmul(self, weight: Tensor) -> Tensor:
        return self.times(weight, self.blocks.to(weight.dtype))

    def times(self, x: Tensor, blocks: Tensor) -> Tensor:
        """X (..., n b) times blkdiag(blocks)."""
        b = blocks.shape[-1]
        if self.alike:
            return (x.reshape(-1, b) @ blocks[0]).view(x.shape)
        parts = x.reshape(-1, self.count, b).transpose(0, 1)  # (n, rows, b)
        return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)

    def lmul(self, weight: Tensor) -> Tensor:
        parts = weight.reshape(self.count, self.blocks.shape[-1], -1)
        return torch.matmul(self.blocks.to(weight.dtype), parts).reshape(weight.shape)

    @property
    def size(self) -> int:
        return self.count * self.blocks.shape[1]


def block_diagonal(blocks: Tensor) -> Tensor:
    """(n, a, b) -> (n a, n b) with the blocks on its diagonal."""
    n, a, b = blocks.shape
    full = blocks.new_zeros(n, a, n, b)
    return full.diagonal_scatter(blocks.permute(1, 2, 0), 0, 0, 2).reshape(n * a, n * b)


def ungroup_blocks(matrix: Tensor, groups: int) -> Tensor:
    """(out, n) with grouped columns -> block-diagonal (out, n * groups)."""
    out, n = matrix.shape
    blocks = matrix.view(groups, out // groups, n)
    return block_diagonal(blocks)


def regroup_blocks(matrix: Tensor, groups: int) -> Tensor | None:
    """Inverse of `ungroup`, or None if an entry off the blocks is not zero."""
    out, n = matrix.shape
    blocks = matrix.view(groups, out // groups, groups, n // groups)
    kept = torch.stack([blocks[g, :, g] for g in range(groups)])  # (groups, out / groups, n / groups)
    if int(matrix.count_nonzero()) != int(kept.count_nonzero()):
        return None
    return kept.reshape(out, n // groups)
