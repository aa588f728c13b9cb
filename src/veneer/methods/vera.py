"""VeRA: random projections that all layers share, and a trained diagonal on either side of them.

References:
    Kopiczko et al. 2023, arxiv.org/abs/2310.11454
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.low_rank import Factored
from ..algebra.operator import Operator
from ..layers.site import Site
from .base import Method
from .checks import check_one_of, check_positive_int, check_probability
from .fields import BiasField, LayerFields, TransposedField
from .hooks import Tensors
from .registry import method
from .tensors import BIAS, Constant, Trained


@method("VERA", prefix="vera_lambda_")
@dataclass
class VeraConfig(LayerFields, BiasField, TransposedField, Method):
    """VeRA. Kopiczko et al. 2023, arxiv.org/abs/2310.11454, eq. 2:  W' = W + diag(b) B diag(d) A

    A (r, widest input) and B (widest output, r) are frozen, drawn once for the adapter; each site uses a slice.

    Args:
        r: rank.
        projection_prng_key: seed of A and B.
        save_projection: write A and B to the file; False relies on the seed when loading.
        vera_dropout: probability of dropping an entry of the adapter's input while training.
        d_initial: starting value of d.
        init_weights: True starts at the identity, False at random.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    own_fields = frozenset({"exclude_modules"})
    tensors = {
        "b": Trained("vera_lambda_b", axes=("out",)),
        "d": Trained("vera_lambda_d"),
        "A": Constant("vera_A", shared="adapter", saved=lambda config: config.save_projection),
        "B": Constant("vera_B", shared="adapter", saved=lambda config: config.save_projection),
        "bias": BIAS,
    }

    def check(self) -> None:
        check_positive_int(self, r=self.r)
        check_probability(self, vera_dropout=self.vera_dropout)
        check_one_of(self, ("none", "all", "vera_only"), bias=self.bias)

    def init_shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        shapes = {"A": (self.r, max(s.patch for s in sites)), "B": (max(s.fan_out for s in sites), self.r)}
        drawn = {}
        for key, shape in shapes.items():
            bound = math.sqrt(6 / shape[1])  # Kaiming uniform, fan in, gain sqrt(2)
            drawn[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return drawn

    def init(self, site: Site) -> dict[str, Tensor]:
        if self.init_weights:
            p = {"b": site.zeros(site.fan_out), "d": site.full(self.d_initial, self.r)}
        else:
            p = {"b": site.ones(site.fan_out), "d": site.normal(self.r)}
        return p | self.init_bias(site)

    def delta(self, p: Tensors, site: Site) -> Operator:
        A = p["A"][:, : site.patch].to(p["d"].device)  # (r, in)
        B = p["B"][: site.fan_out].to(p["d"].device)  # (out, r)
        return Factored(B, A, inner=p["d"], outer=p["b"], dropout=self.vera_dropout)

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        return self.bias_shift(p, site)
