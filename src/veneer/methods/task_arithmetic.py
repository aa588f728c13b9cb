"""Ways to combine task tensors: what several adapters have in one place, each of the same shape.

References:
    Yadav et al. 2023, arxiv.org/abs/2306.01708 (TIES: trim, elect signs, merge what agrees)
    Yu et al. 2023, arxiv.org/abs/2311.03099 (DARE: drop at random and rescale)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..targets.suggest import suggest

WAYS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
EXACT = ("svd", "cat")
KINDS = ("svd", "linear", "cat", *(w for w in WAYS if w != "linear"), *(f"{w}_svd" for w in WAYS if w != "linear"))
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; fields are the arguments of `add_weighted_adapter`.

    Raises:
        ValueError: a value that is not allowed, or none where one is needed.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True  # the factors kept are the same either way
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        kind, density, rank = self.combination_type, self.density, self.svd_rank
        if kind not in KINDS:
            raise ValueError(f"combination_type={kind!r}: must be one of {', '.join(KINDS)}{suggest(str(kind), KINDS)}")
        if self.majority_sign_method not in SIGNS:
            raise ValueError(f"majority_sign_method={self.majority_sign_method!r}: must be 'total' or 'frequency'")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"svd_rank={rank!r}: must be a whole number, 1 or more, or None for the largest rank")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp={self.svd_clamp!r}: is a quantile; must be in [0, 1] or None")
        if self.prunes and (density is None or not 0 <= density <= 1 or (self.way.startswith("dare") and not density)):
            low = "(0" if self.way.startswith("dare") else "[0"
            raise ValueError(
                f"density={density!r}: combination_type={kind!r} keeps this fraction of the entries; must be in {low}, 1]"
            )

    @property
    def way(self) -> str:
        """What is done to task tensors."""
        return "linear" if self.combination_type in EXACT else self.combination_type.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        return self.way != "linear"

    @property
    def by_svd(self) -> bool:
        """Whether task tensors are the changes of the weight, whose best low-rank part is kept, not single factors."""
        return self.combination_type.endswith("svd")

    def merged(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Task tensors of one shape, and a weight for each -> their combination."""
        if self.prunes and self.density is not None:
            prune = drop_random if self.way.startswith("dare") else trim_smallest
            tensors = [prune(t, self.density) for t in tensors]
        stacked = torch.stack(list(tensors))  # (n, ...)
        scale = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * scale.view(-1, *(1,) * (stacked.ndim - 1))
        if not self.way.endswith("ties"):
            return weighted.sum(0)
        agrees = elect_signs(stacked, self.majority_sign_method)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def trim_smallest(tensor: Tensor, density: float) -> Tensor:
    """Keep the fraction `density` of the entries that are largest in magnitude; TIES, step 1."""
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def drop_random(tensor: Tensor, density: float) -> Tensor:
    """Keep each entry with probability `density` and divide by it, so that the mean stays; DARE, eq. 3-4."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def elect_signs(stacked: Tensor, how: str) -> Tensor:
    """Stacked (n, ...) -> where each has the elected sign; TIES, step 2.

    Args:
        how: "total", the sign of the sum; "frequency", that of most of them.
    """
    votes = (stacked if how == "total" else stacked.sign()).sum(0)
    return stacked.sign() == torch.where(votes >= 0, 1, -1).to(stacked.dtype)
