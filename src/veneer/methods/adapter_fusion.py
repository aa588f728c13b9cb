"""AdapterFusion: attention over the outputs of several bottleneck adapters.

References:
    Pfeiffer et al. 2021, arxiv.org/abs/2005.00247
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.site import Site
from ..targets.blocks import SublayerOutput
from .base import Method, OtherSublayers
from .checks import check_probability
from .fields import SavedModules
from .hooks import Tensors
from .registry import method
from .tensors import Trained

DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


@method("ADAPTER_FUSION", foreign={"temperature": False})
@dataclass
class AdapterFusionConfig(SavedModules, Method):
    """AdapterFusion. Pfeiffer et al. 2021, arxiv.org/abs/2005.00247, section 3.2:  softmax(Q z . K u_i) V u_i + a

    u_i are the outputs of bottleneck adapters that are on the model already, z and a the input and the residual of the
    last of them. Activate the fusion alone: it runs the adapters it names, which need not be active.

    Args:
        adapter_names: the adapters to fuse, two or more, all at the same places.
        query: whether z is mapped by a trained Q.
        key: whether u_i is mapped by a trained K.
        value: whether u_i is mapped by a trained V.
        query_before_ln: the query is the sub-layer's output instead of z, which may be behind the block's norm.
        residual_before: a is added to each u_i instead of to the sum.
        value_before_softmax: V acts on each u_i; False: on their weighted sum.
        value_initialized: V starts at the identity; False: at random.
        regularization: whether a penalty on the loss keeps V near the identity.
        dropout: probability of dropping a score while training; None for the base model's attention dropout.
        train_adapters: whether gradients reach the fused adapters too.
    """

    adapter_names: list[str] = field(default_factory=list)
    query: bool = True
    key: bool = True
    value: bool = True
    query_before_ln: bool = False
    residual_before: bool = False
    value_before_softmax: bool = True
    value_initialized: bool = True
    regularization: bool = True
    dropout: float | None = None
    train_adapters: bool = False

    tensors = {
        "query": Trained("fusion_query.weight"), "query_bias": Trained("fusion_query.bias"),
        "key": Trained("fusion_key.weight"), "key_bias": Trained("fusion_key.bias"),
        "value": Trained("fusion_value.weight"),
    }  # fmt: skip
    acts_on = "modules"

    def check(self) -> None:
        if self.dropout is not None:
            check_probability(self, dropout=self.dropout)
        if not (self.query or self.key or self.value):
            raise ValueError("AdapterFusionConfig(query=False, key=False, value=False): there is nothing to train")
        if not isinstance(self.adapter_names, (list, tuple)) or len(set(self.adapter_names)) != len(self.adapter_names):
            raise ValueError(
                f"AdapterFusionConfig(adapter_names={self.adapter_names!r}): must be a list of different names"
            )

    def prepare(self, model: nn.Module) -> Self:
        if len(self.adapter_names) < 2:
            raise ValueError(
                f"AdapterFusionConfig(adapter_names={self.adapter_names!r}): name two adapters or more that are on the model"
            )
        if self.dropout is not None:
            return self
        config = getattr(model, "config", None)
        found = (getattr(config, name, None) for name in DROPOUTS)
        rate = next((float(r) for r in found if isinstance(r, (int, float))), 0.0)
        return self.replace(dropout=rate)

    @property
    def uses(self) -> Collection[str]:
        return self.adapter_names

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Mapping[str, SublayerOutput]:
        first: dict[str, SublayerOutput] = {}
        for name in self.adapter_names:
            found = others(name)
            methods: list[Any] = [m for _, m in found.values()]
            if not methods or any(m.peft_name != "BOTTLENECK" or m.parallel for m in methods):
                raise ValueError(
                    f"AdapterFusionConfig(adapter_names={self.adapter_names!r}): {name!r} is no sequential bottleneck adapter; "
                    "only those can be fused: add it with BottleneckConfig(parallel=False), or combine others with "
                    "veneer.Parallel or veneer.Average"
                )
            spots = {n: s for n, (s, _) in found.items()}
            if first and spots.keys() != first.keys():
                apart = sorted(spots.keys() ^ first.keys())
                raise ValueError(
                    f"AdapterFusionConfig(adapter_names={self.adapter_names!r}): they are at different places, such as "
                    f"{apart[0]!r}; fuse adapters of the same kind"
                )
            first = spots
        return first

    def init(self, site: Site) -> dict[str, Tensor]:
        n = site.fan_out
        p: dict[str, Tensor] = {}
        for name in ("query", "key"):
            if getattr(self, name):
                p |= {name: site.normal(n, n, std=0.02), f"{name}_bias": site.zeros(n)}
        if self.value:
            start = site.computed((n, n), lambda: torch.full((n, n), 1e-6).fill_diagonal_(1.0))
            p["value"] = start if self.value_initialized else site.normal(n, n, std=0.02)
        return p

    @property
    def training_hooks(self) -> tuple[str, ...]:
        return self.steered if self.regularization and self.value else ()

    def penalty(self, p: Tensors, site: Site) -> Tensor | None:
        """0.01 sum |V - I|^2, which keeps the values near the identity (Pfeiffer et al. 2021, appendix)."""
        eye = torch.eye(site.fan_out, device=p["value"].device, dtype=p["value"].dtype)
        return 0.01 * (p["value"] - eye).square().sum()

    def post(self, p: Tensors, site: Site, x: object, y: Tensor) -> Tensor:
        fused: list[tuple[Any, Tensors]] = []
        for name in self.adapter_names:
            found = site.adapter(name)
            assert found is not None  # the same places, and adapters in use are not deleted
            other, own = found
            fused.append((other, own if self.train_adapters else {k: t.detach() for k, t in own.items()}))
        last = fused[-1][0]
        z, a = last.before(site, x, y)  # (..., n) each
        u = torch.stack([other.up(own, site, z) for other, own in fused], -2)  # (..., adapters, n)
        if self.residual_before:
            u = u + a.unsqueeze(-2)
        query = linear_map(last.sub_layer(site, x, y) if self.query_before_ln else z, p, "query")  # (..., n)
        scores = torch.einsum("...n,...an->...a", query, linear_map(u, p, "key"))  # (..., adapters)
        share = F.dropout(scores, self.dropout or 0.0, site.owner.training).softmax(-1)
        if self.value_before_softmax:
            out = torch.einsum("...a,...an->...n", share, linear_map(u, p, "value"))
        else:
            out = linear_map(torch.einsum("...a,...an->...n", share, u), p, "value")
        changed: Tensor = last.behind(site, x, y, out if self.residual_before else out + a)
        return changed


def linear_map(x: Tensor, p: Tensors, name: str) -> Tensor:
    """X mapped by the trained matrix of this name, where there is one."""
    if name not in p:
        return x
    bias = p.get(f"{name}_bias")
    return F.linear(x, p[name].to(x.dtype), None if bias is None else bias.to(x.dtype))
