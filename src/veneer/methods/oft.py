"""OFT: a block-diagonal rotation of the weight's input side.

References:
    Qiu et al. 2023, arxiv.org/abs/2306.07280
    Qiu et al. 2025 (OFTv2, Cayley-Neumann), arxiv.org/abs/2506.19847
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.block_diagonal import BlockDiagonal
from ..algebra.operator import Operator
from ..layers.site import Site
from .base import Method
from .checks import check_one_of, check_positive, check_positive_int, check_probability
from .fields import BiasField, LayerFields, TransposedField
from .hooks import Tensors
from .registry import method
from .tensors import BIAS, Trained


@method("OFT")
@dataclass
class OFTConfig(LayerFields, BiasField, TransposedField, Method):
    """OFT. Qiu et al. 2023, arxiv.org/abs/2306.07280, eq. 3:  W' = W R^T, R = blkdiag((I + Q)(I - Q)^-1), Q = -Q^T

    Give either `oft_block_size` or `r`, and 0 for the other.

    Args:
        r: number of blocks, or 0.
        oft_block_size: size of a block, or 0.
        module_dropout: probability, for each block, of being the identity in a training step.
        init_weights: True starts at the identity, False at random.
        coft: keep each rotation within `eps` of the identity (COFT, eq. 8).
        eps: radius of that ball.
        block_share: one block, repeated.
        use_cayley_neumann: a truncated Neumann series in place of the inverse (OFTv2, eq. 5).
        num_cayley_neumann_terms: terms of that series.

    Raises:
        ValueError: both or neither of `r` and `oft_block_size`, or one that does not divide a layer's input.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    tensors = {"Q": Trained("oft_R.weight", embedding="oft_embedding_R.weight"), "bias": BIAS}

    def check(self) -> None:
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"OFTConfig(r={self.r!r}, oft_block_size={self.oft_block_size!r}): give one of them and 0 for the other"
            )
        check_positive_int(self, **({"r": self.r} if self.r else {"oft_block_size": self.oft_block_size}))
        check_positive_int(self, num_cayley_neumann_terms=self.num_cayley_neumann_terms)
        check_probability(self, module_dropout=self.module_dropout)
        check_positive(self, eps=self.eps)
        check_one_of(self, ("none", "all", "oft_only"), bias=self.bias)

    def blocks(self, site: Site) -> tuple[int, int]:
        """Number of blocks and their size at `site`."""
        n = site.fan_out if site.lookup else site.patch
        given, what = (self.r, "r") if self.r else (self.oft_block_size, "oft_block_size")
        if n % given:
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            near = min(divisors, key=lambda d: abs(d - given))
            if not self.from_file:
                near_ones = ", ".join(map(str, sorted(divisors, key=lambda d: abs(d - given))[:3]))
                raise ValueError(
                    f"{site.name}: {what}={given} does not divide its {n} rotated features; use a divisor "
                    f"(nearest: {near_ones}) or exclude the module"
                )
            given = near  # peft adjusts the size when it writes such a file
        return (given, n // given) if self.r else (n // given, given)

    def init(self, site: Site) -> dict[str, Tensor]:
        n, b = self.blocks(site)
        shape = (1 if self.block_share else n, b * (b - 1) // 2)  # (blocks, upper triangle)
        return {"Q": site.zeros(*shape) if self.init_weights else site.normal(*shape, std=0.1)} | self.init_bias(site)

    def rotation(self, p: Tensors, site: Site) -> Operator:
        """Blkdiag of R^T, from the entries of Q above the diagonal."""
        n, b = self.blocks(site)
        upper = p["Q"]  # (blocks, b (b - 1) / 2)
        if self.coft:  # the value is the constrained one, the gradient passes as it is; `constrain` keeps them the same
            upper = upper - upper.detach() + self.in_ball(upper).detach()
        rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
        Q = upper.new_zeros(upper.shape[0], b, b).index_put((torch.arange(upper.shape[0], device=upper.device)[:, None],
                                                             rows, columns), upper)  # fmt: skip
        R = self.cayley(Q - Q.transpose(1, 2))  # (blocks, b, b)
        return BlockDiagonal(R.transpose(1, 2), count=n, skip=self.module_dropout)

    def cayley(self, Q: Tensor) -> Tensor:
        """Skew-symmetric Q (n, b, b) -> orthogonal R (n, b, b)."""
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
        if not self.use_cayley_neumann:
            R: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)  # (I - Q)(I + Q)^-1 on row vectors
            return R
        # R = I + 2 (Q + ... + Q^(k-1)) + Q^k, the last power halved; k as peft counts its terms.
        terms = self.num_cayley_neumann_terms
        if terms == 1:
            return eye.clone()
        if terms == 2:
            return eye + 2 * Q
        R, power = eye + 2 * Q, Q
        last = max(3, terms - 1)
        for k in range(2, last + 1):
            power = torch.bmm(power, Q)
            R = R + (power if k == last else 2 * power)
        return R

    @property
    def training_hooks(self) -> tuple[str, ...]:
        return self.steered if self.coft else ()

    def constrain(self, p: Tensors, site: Site) -> dict[str, Tensor]:
        return {"Q": self.in_ball(p["Q"])}

    def in_ball(self, upper: Tensor) -> Tensor:
        """COFT: pull a block's Q back onto the ball of radius eps / sqrt(blocks)."""
        radius = self.eps / upper.shape[0] ** 0.5
        norm = (2 * upper.square().sum(1, keepdim=True)).sqrt()  # Frobenius norm of the skew matrix, (blocks, 1)
        # The margin keeps a block that was projected before from drifting with every rounding.
        return torch.where(norm <= radius * (1 + 1e-5), upper, radius * upper / norm.clamp_min(1e-30))

    def right(self, p: Tensors, site: Site) -> Operator | None:
        return None if site.lookup else self.rotation(p, site)

    def left(self, p: Tensors, site: Site) -> Operator | None:
        return self.rotation(p, site) if site.lookup else None  # an embedding's width is its output side

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        return self.bias_shift(p, site)
