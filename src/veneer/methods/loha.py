"""LoHa: the Hadamard product of two low-rank matrices.

References:
    Hyeon-Woo et al. 2021 (FedPara), arxiv.org/abs/2108.06098
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.hadamard import Hadamard
from ..algebra.operator import Operator
from ..layers.site import Site
from .base import Method
from .checks import check_positive, check_positive_int, check_probability
from .fields import LayerFields, PatternFields
from .hooks import Tensors
from .registry import method
from .tensors import Trained


@method("LOHA", prefix="hada_", patterns={"rank_pattern": "r", "alpha_pattern": "alpha"})
@dataclass
class LoHaConfig(LayerFields, PatternFields, Method):
    """LoHa. Hyeon-Woo et al. 2021, arxiv.org/abs/2108.06098, prop. 1:  W' = W + (alpha / r) (X1 Y1) * (X2 Y2)

    Args:
        r: rank of each of the two factors.
        alpha: alpha in the scale alpha / r.
        rank_dropout: probability of dropping an output row of the delta while training.
        module_dropout: probability of leaving the adapter out of a layer in a training step.
        use_effective_conv2d: for kernels above 1, the tensor form of prop. 3 with a core over the kernel.
        init_weights: True starts at the identity, False at random.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True

    tensors = {key: Trained(f"hada_{key}") for key in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}

    def check(self) -> None:
        check_positive_int(self, r=self.r)
        check_positive(self, alpha=self.alpha)
        check_probability(self, rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)

    def core(self, site: Site) -> bool:
        """Whether the delta has a core over the kernel, as peft builds it (1-D and 2-D kernels above 1)."""
        return self.use_effective_conv2d and len(site.kernel) in (1, 2) and set(site.kernel) != {1}

    def init(self, site: Site) -> dict[str, Tensor]:
        r, out, into = self.r, site.fan_out, site.fan_in // site.groups
        p = {}
        for side in ("1", "2"):
            if self.core(site):
                p[f"t{side}"] = site.kaiming_uniform(r, r, *(*site.kernel, 1)[:2])  # (r, r, *kernel)
                p[f"w{side}_a"] = site.kaiming_uniform(r, out)  # (r, out)
                p[f"w{side}_b"] = site.kaiming_uniform(r, into)  # (r, in / groups)
            else:
                p[f"w{side}_a"] = site.kaiming_uniform(out, r)  # (out, r)
                p[f"w{side}_b"] = site.kaiming_uniform(r, site.patch // site.groups)  # (r, in / groups * kernel)
        if self.init_weights:
            p["w2_b"] = site.zeros(*p["w2_b"].shape)
        return p

    def delta(self, p: Tensors, site: Site) -> Operator:
        X, Y = {}, {}
        for s in "12":
            a, b = p[f"w{s}_a"], p[f"w{s}_b"]
            if self.core(site):  # the product of side s is sum_i a[i, out] sum_j t[i, j, kernel] b[j, in]
                X[s], Y[s] = a.T, torch.einsum("ijkl,jn->inkl", p[f"t{s}"], b).flatten(1)
            else:
                X[s], Y[s] = a, b  # (out, r), (r, in / groups * kernel)
        scale = self.alpha / self.r
        return Hadamard(X["1"], Y["1"], X["2"], Y["2"], scale, row_dropout=self.rank_dropout, skip=self.module_dropout)
