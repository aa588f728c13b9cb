"""Bottleneck adapters: small two-layer networks in the residual stream, in all their published forms.

References:
    Houlsby et al. 2019, arxiv.org/abs/1902.00751: after attention and after feed-forward
    Pfeiffer et al. 2021, arxiv.org/abs/2005.00247: after feed-forward only
    He et al. 2022, arxiv.org/abs/2110.04366: parallel to a sub-layer, with a scale
    Mahabadi et al. 2021, arxiv.org/abs/2106.04647: Compacter, whose matrices are sums of Kronecker products
    Mao et al. 2022, arxiv.org/abs/2110.07577: gating
    Steitz and Roth 2024, arxiv.org/abs/2406.06820: Adapter+, one scale a channel, behind the norm
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.site import Site
from ..targets.blocks import SublayerOutput, find_sublayers, sublayer_at
from ..targets.select import matches
from ..targets.suggest import show, suggest
from .base import Method, OtherSublayers
from .checks import (
    check_one_of,
    check_positive,
    check_positive_int,  # fmt: skip
    check_probability,
)
from .fields import TargetFields
from .hooks import Tensors
from .registry import method
from .tensors import Sharing, Trained

ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "mish": F.mish,
    "linear": lambda x: x,
}
ROLES = ("attention", "cross_attention", "feed_forward")
INITS = ("identity", "bert", "houlsby", "mam_adapter")

# What each kind says where the config says nothing.
COMMON: dict[str, Any] = {
    "places": ["feed_forward"], "reduction_factor": 16, "activation": "relu", "parallel": False, "scaling": 1.0,
    "original_ln_before": False, "phm_dim": 0,
}  # fmt: skip
BOTH = ["attention", "cross_attention", "feed_forward"]
KINDS: dict[str, dict[str, Any]] = {
    "pfeiffer": COMMON | {"original_ln_before": True},
    "houlsby": COMMON | {"places": BOTH, "activation": "swish"},
    "parallel": COMMON | {"reduction_factor": 2, "parallel": True, "scaling": 4.0},
    "compacter": COMMON | {"places": BOTH, "reduction_factor": 32, "activation": "gelu", "phm_dim": 4},
}


def _sharing(config: BottleneckConfig, key: str) -> Sharing:
    return "adapter" if config.shares(key) else ""


@method("BOTTLENECK")
@dataclass
class BottleneckConfig(TargetFields, Method):
    """Bottleneck adapters. Houlsby et al. 2019, arxiv.org/abs/1902.00751:  h <- a + s W_up act(W_down z)

    h is a sub-layer's output, r the residual stream it is added to, N the norm behind the sum where the block has one
    there. z, what goes in, is h, or N(r + h) with `original_ln_before`, or r itself if `parallel` (He et al. 2022,
    arxiv.org/abs/2110.04366, eq. 5). a, the residual, is h, or z without `residual_before_ln`. In blocks without such an
    N, r + h stands for N(r + h). The result goes where h went: r + h, then N.

    Args:
        kind: what the fields left at None mean. "pfeiffer": one adapter a block, after feed-forward, input behind the
            norm; "houlsby": two, after attention and feed-forward (and cross-attention); "parallel": one beside
            feed-forward; "compacter": as houlsby, with hypercomplex matrices.
        places: of "attention", "cross_attention", "feed_forward", those whose output is adapted.
        target_modules: names (suffixes), or a regular expression, of modules whose output is adapted instead. Those
            that are not a sub-layer of a block take z = a = their output, or their own input if `parallel`.
        leave_out: indices of blocks without adapters, counted through the encoder and then the decoder.
        reduction_factor: width of h divided by the width of the bottleneck; a number, or a mapping from a block's
            index (or "default") to one.
        width: width of the bottleneck in place of reduction_factor; a number or a mapping.
        activation: relu, gelu, gelu_new, swish, silu, tanh, sigmoid, leakyrelu, relu6, elu, mish or linear.
        dropout: probability of dropping an entry of the adapter's output while training.
        stochastic_depth: probability of leaving the adapter out for a row of the batch while training.
        layer_norm: "before", "after" or "both": norms of the adapter's own at its input and output.
        original_ln_before: whether z is behind the block's sum and norm.
        original_ln_after: False leaves the block's sum and norm out behind the adapter, whose output is then the stream.
        residual_before_ln: True for a = h, "post_add" for a = r + h, False for a = z.
        adapter_residual_before_ln: add a before the adapter's own norm at the output instead of behind it.
        parallel: whether the input is the sub-layer's, and the output is added to h.
        scaling: s: a number, "learned" (one number) or "channel" (one a channel). The parallel kind's 4 is the paper's
            and wants a small learning rate (2e-4; the others 1e-3).
        gating: multiply by a learned gate sigmoid(w z + b), averaged over the tokens.
        phm_dim: n, the number of Kronecker products in each matrix; 0 for plain matrices.
        phm_rank: rank of the products' second factors; 0 for full matrices.
        phm_shared_rule: one set of first factors (the rule) for all places, instead of one for each matrix.
        phm_factorized_rule: first factors of rank 1.
        phm_shared_weights: one set of second factors for all places.
        phm_bias: whether hypercomplex matrices come with a bias.
        init_weights: "identity" changes nothing at the start; "bert" (normal, std 0.02), "houlsby" (truncated normal, std
            0.01) and "mam_adapter" (as identity) are the starts of AdapterHub's library.
    """

    kind: str = "pfeiffer"
    places: list[str] | None = None
    leave_out: list[int] = field(default_factory=list)
    reduction_factor: float | dict[str, float] | None = None
    width: int | dict[str, int] | None = None
    activation: str | None = None
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    layer_norm: str | None = None
    original_ln_before: bool | None = None
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    parallel: bool | None = None
    scaling: float | str | None = None
    gating: bool = False
    phm_dim: int | None = None
    phm_rank: int = 1
    phm_shared_rule: bool = True
    phm_factorized_rule: bool = False
    phm_shared_weights: bool = False
    phm_bias: bool = True
    init_weights: str = "identity"

    recipe = {"learning_rate": 2e-3, "warmup": 10}
    tensors = {
        "down": Trained("adapter_down.weight"), "down_bias": Trained("adapter_down.bias"),
        "up": Trained("adapter_up.weight"), "up_bias": Trained("adapter_up.bias"), "scale": Trained("adapter_scaling"),
        "gate": Trained("adapter_gate.weight"), "gate_bias": Trained("adapter_gate.bias"),
        "before": Trained("adapter_norm_before.weight"), "before_bias": Trained("adapter_norm_before.bias"),
        "after": Trained("adapter_norm_after.weight"), "after_bias": Trained("adapter_norm_after.bias"),
        # Compacter: the first factors of the Kronecker products, one set a matrix or one for the adapter, and the second.
        **{f"{side}_{part}": Trained(f"adapter_{side}.{part}") for side in ("down", "up")
           for part in ("rule", "rule_left", "rule_right")},
        **{part: Trained(f"phm_{part}", shared=partial(_sharing, key=part)) for part in ("rule", "rule_left", "rule_right")},
        **{f"{side}_{part}": Trained(f"adapter_{side}.{part}", shared=partial(_sharing, key=f"{side}_{part}"),
                                     shared_name=f"phm_{side}_{part}")
           for side in ("down", "up") for part in ("left", "right")},
    }  # fmt: skip
    acts_on = "modules"

    @classmethod
    def recipe_for(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        hot = given.get("kind") == "parallel"  # its scale of 4
        return {**cls.recipe, "learning_rate": 2e-4} if hot else cls.recipe

    def check(self) -> None:
        check_one_of(self, tuple(KINDS), kind=self.kind)
        for name, value in KINDS[self.kind].items():
            if getattr(self, name) is None and not (name == "reduction_factor" and self.width is not None):
                setattr(self, name, value)
        if self.width is not None and self.reduction_factor is not None:
            raise ValueError(
                f"BottleneckConfig(width={self.width!r}, reduction_factor={self.reduction_factor!r}): both say the width of "
                "the bottleneck; leave one out"
            )
        for role in self.places or ():
            check_one_of(self, ROLES, places=role)
        for what in ("width", "reduction_factor"):
            value = getattr(self, what)
            for one in value.values() if isinstance(value, Mapping) else [] if value is None else [value]:
                (check_positive_int if what == "width" else check_positive)(self, **{what: one})
            if isinstance(value, Mapping):
                setattr(self, what, {str(k): v for k, v in value.items()})  # as JSON has them
        if self.activation not in ACTIVATIONS:
            hint = suggest(str(self.activation), ACTIVATIONS)
            raise ValueError(
                f"BottleneckConfig(activation={self.activation!r}): must be one of {', '.join(ACTIVATIONS)}{hint}"
            )
        check_probability(self, dropout=self.dropout, stochastic_depth=self.stochastic_depth)
        check_one_of(self, (None, "before", "after", "both"), layer_norm=self.layer_norm)
        check_one_of(self, (True, False, "post_add"), residual_before_ln=self.residual_before_ln)
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError(
                "BottleneckConfig(residual_before_ln='post_add'): the residual behind the block's sum needs "
                "original_ln_before=True"
            )
        if isinstance(self.scaling, str):
            check_one_of(self, ("learned", "channel"), scaling=self.scaling)
        elif isinstance(self.scaling, bool) or not isinstance(self.scaling, (int, float)):
            raise ValueError(f"BottleneckConfig(scaling={self.scaling!r}): must be a number, 'learned' or 'channel'")
        for what in ("phm_dim", "phm_rank"):
            if getattr(self, what) != 0:
                check_positive_int(self, **{what: getattr(self, what)})
        check_one_of(self, INITS, init_weights=self.init_weights)

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Mapping[str, SublayerOutput]:
        spots = {s.name: s for s in find_sublayers(model)}
        if self.target_modules is not None:
            inner = [n for n, _ in model.named_modules() if n and ":" not in n]
            chosen = [n for n in inner if matches(n, self.target_modules)]
            if not chosen:
                leaves = {n.rpartition(".")[2] for n in inner}
                hint = suggest(str(next(iter(self.target_modules), "")), leaves)
                raise ValueError(
                    f"target_modules={show(self.target_modules)} matches no module{hint}; a bottleneck is put at the "
                    f"output of any module; places of this model: {show([*spots][:6]) if spots else 'none known'}"
                )
            found = [sublayer_at(model, n, spots) for n in chosen]
        else:
            found = [s for s in spots.values() if s.role in (self.places or ())]
            if not found:
                there = sorted({s.role for s in spots.values()})
                raise ValueError(
                    f"BottleneckConfig(places={self.places!r}): {type(model).__name__} has "
                    + (f"{', '.join(there)} only" if there else "no transformer blocks that are understood")
                    + "; name the modules whose output to adapt, such as target_modules=['mlp'] or a regular expression"
                )
        kept = [s for s in found if s.layer not in self.leave_out and not matches(s.name, self.exclude_modules)]
        if not kept:
            raise ValueError(
                f"BottleneckConfig(leave_out={self.leave_out!r}, exclude_modules={self.exclude_modules!r}): nothing is left "
                f"of {len(found)} places"
            )
        unknown = next((s for s in kept if not s.residual and self.original_ln_before), None)
        if unknown is not None and self.residual_before_ln == "post_add":
            raise ValueError(f"{unknown.name}: the residual stream is not known here; leave residual_before_ln at True")
        kept = [s.at_norm() if s.norm and not self.original_ln_after else s for s in kept]
        return {s.name: s for s in kept}

    def spot(self, site: Site) -> SublayerOutput:
        assert site.spot is not None
        return site.spot

    def fan_in(self, site: Site) -> int:
        return site.fan_in if self.parallel else site.fan_out

    def bottleneck(self, site: Site) -> int:
        """The width of the bottleneck at a place."""
        given: Any = self.reduction_factor if self.width is None else self.width
        if isinstance(given, Mapping):
            layer = str(self.spot(site).layer)
            if layer not in given and "default" not in given:
                what = "reduction_factor" if self.width is None else "width"
                raise ValueError(f"{site.name}: {what}={given!r} says nothing of block {layer}; add it, or a 'default'")
            given = given.get(layer, given.get("default"))
        return max(1, int(site.fan_out // given)) if self.width is None else int(given)

    # Tensors.

    def shares(self, key: str) -> bool:
        """Whether all places use one tensor `key`."""
        if not self.phm_dim:
            return False
        if key.startswith("rule"):
            return self.phm_shared_rule and self.phm_factorized_rule == (key != "rule")
        factors = ("_left", "_right") if self.phm_rank else ("_left",)
        return self.phm_shared_weights and key.endswith(factors) and "rule" not in key

    def init_shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        sizes = {(self.fan_in(s), self.bottleneck(s), s.fan_out) for s in sites}
        if self.phm_shared_weights and len(sizes) > 1:
            raise ValueError(
                f"BottleneckConfig(phm_shared_weights=True): the places have different sizes {sorted(sizes)}; give them one "
                "width, or phm_shared_weights=False"
            )
        wide, narrow, out = next(iter(sizes))
        drawn = draw_rule(self, "", torch.empty)
        for side, a, b in (("down", wide, narrow), ("up", narrow, out)):
            drawn |= draw_factors(self, side, a, b, torch.empty)
        return {k: t for k, t in drawn.items() if self.shares(k)}

    def init(self, site: Site) -> dict[str, Tensor]:
        wide, narrow, out = self.fan_in(site), self.bottleneck(site), site.fan_out
        if site.kernel or not wide:
            raise ValueError(
                f"{site.name}: a bottleneck acts on the last axis of a sequence of vectors, and "
                f"{type(site.owner).__name__} has none at its {'input' if self.parallel else 'output'}; name another module"
            )
        p: dict[str, Tensor] = {}
        for side, a, b in (("down", wide, narrow), ("up", narrow, out)):
            if self.phm_dim:
                p |= draw_factors(self, side, a, b, site.empty)
                p |= {} if self.phm_shared_rule else draw_rule(self, f"{side}_", site.empty)
            else:
                p[side] = draw_matrix(self, side, a, b, site)
            if self.phm_bias or not self.phm_dim:
                p[f"{side}_bias"] = site.zeros(b)
        if isinstance(self.scaling, str):
            p["scale"] = site.ones(1 if self.scaling == "learned" else out)
        if self.gating:
            p |= {"gate": site.normal(1, wide, std=0.02), "gate_bias": site.zeros(1)}
        if self.layer_norm in ("before", "both"):
            p |= {"before": site.ones(wide), "before_bias": site.zeros(wide)}
        if self.layer_norm in ("after", "both"):
            p |= {"after": site.ones(out), "after_bias": site.zeros(out)}
        return {k: t for k, t in p.items() if not self.shares(k)}

    # The forward.

    def post(self, p: Tensors, site: Site, x: object, y: Tensor) -> Tensor:
        z, a = self.before(site, x, y)
        return self.behind(site, x, y, self.adapt(p, site, z, a, self.up(p, site, z)))

    def stream(self, site: Site, x: Any) -> Tensor | None:
        """R, the residual stream, or None where it is not known."""
        r: Tensor | None = x[site.spot.residual] if site.spot is not None and site.spot.residual else None
        return r

    def sub_layer(self, site: Site, x: Any, y: Tensor) -> Tensor:
        """H, the sub-layer's output; behind the norm it is what the sum has more than r."""
        if not self.spot(site).on_norm:
            return y
        r = self.stream(site, x)
        h: Tensor = next(iter(x.values())) - r
        return h

    def before(self, site: Site, x: Any, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Z, the adapter's input, and a, its residual, both (..., width)."""
        spot, r = self.spot(site), self.stream(site, x)
        if self.parallel:
            return (next(iter(x.values())) if r is None else r), None
        h = self.sub_layer(site, x, y)
        z, a = h, h
        if self.original_ln_before and r is not None:
            total = next(iter(x.values())) if spot.on_norm else h + r
            z = y if spot.on_norm else total if site.norm is None else site.norm(total)
            a = total if self.residual_before_ln == "post_add" else h
        return z, (a if self.residual_before_ln else z)

    def up(self, p: Tensors, site: Site, z: Tensor) -> Tensor:
        """S W_up act(W_down z), (..., width)."""
        inner = z
        if "before" in p:
            inner = norm_output(z, p["before"], p["before_bias"])
        inner = ACTIVATIONS[str(self.activation)](multiply(self, p, "down", inner))  # (..., bottleneck)
        u = multiply(self, p, "up", inner)  # (..., width)
        if self.stochastic_depth and site.owner.training:
            kept = torch.rand(u.shape[0], *(1,) * (u.ndim - 1), device=u.device) >= self.stochastic_depth
            u = u * kept.to(u.dtype) / (1 - self.stochastic_depth)
        scale: Any = p["scale"].to(u.dtype) if "scale" in p else self.scaling
        scaled: Tensor = u * scale
        return scaled

    def adapt(self, p: Tensors, site: Site, z: Tensor, a: Tensor | None, u: Tensor) -> Tensor:
        """The adapter's output, with its residual unless it is parallel."""
        u = F.dropout(u, self.dropout, site.owner.training)
        if "gate" in p:
            if z.ndim < 3:
                raise ValueError(
                    f"{site.name}: gating averages over the tokens of each row, and {type(site.owner).__name__} sees "
                    f"{tuple(z.shape)}, without a token axis; use gating=False here"
                )
            gate = torch.sigmoid(F.linear(z, p["gate"].to(z.dtype), p["gate_bias"].to(z.dtype)))  # (..., tokens, 1)
            u = u * gate.mean(-2, keepdim=True)
        if a is not None and self.adapter_residual_before_ln:
            u = u + a
        if "after" in p:
            u = norm_output(u, p["after"], p["after_bias"])
        return u if a is None or self.adapter_residual_before_ln else u + a

    def behind(self, site: Site, x: object, y: Tensor, u: Tensor) -> Tensor:
        """What the module has to put out for the block to go on from u."""
        out = u + self.sub_layer(site, x, y) if self.parallel else u
        r = self.stream(site, x)
        if self.original_ln_after or self.spot(site).on_norm or r is None:
            return out
        return out - r  # the block adds r, which is in u already


def draw_rule(config: BottleneckConfig, prefix: str, empty: Any) -> dict[str, Tensor]:
    """The first factors A_1 ... A_n of a matrix, (n, n, n), or their rank-1 factors."""
    n = config.phm_dim or 0
    shapes = {"rule_left": (n, n, 1), "rule_right": (n, 1, n)} if config.phm_factorized_rule else {"rule": (n, n, n)}
    std = n**-0.25 if config.phm_factorized_rule else n**-0.5
    return {prefix + k: draw_weights(empty(*shape), std) for k, shape in shapes.items()}


def draw_factors(config: BottleneckConfig, side: str, rows: int, columns: int, empty: Any) -> dict[str, Tensor]:
    """The second factors B_1 ... B_n, (n, rows / n, columns / n), or their factors of rank `phm_rank`."""
    n, r = config.phm_dim or 1, config.phm_rank
    if rows % n or columns % n:
        raise ValueError(
            f"BottleneckConfig(phm_dim={n}): must divide both sides of a matrix of {rows} x {columns}; change "
            "phm_dim or the width"
        )
    a, b = rows // n, columns // n
    small = 1.0 if side == "down" else 0.0 if config.init_weights in ("identity", "mam_adapter") else 0.01
    if not r:
        return {f"{side}_left": draw_weights(empty(n, a, b), small * rows**-0.5)}
    left, right = draw_weights(empty(n, a, r), rows**-0.5), draw_weights(empty(n, r, b), small * r**-0.5)
    return {f"{side}_left": left, f"{side}_right": right}


def draw_matrix(config: BottleneckConfig, side: str, rows: int, columns: int, site: Site) -> Tensor:
    """A plain matrix (columns, rows), as F.linear takes it."""
    if config.init_weights == "bert":
        return site.normal(columns, rows, std=0.02)
    if config.init_weights == "houlsby":
        t = site.empty(columns, rows)
        return t if site.meta else nn.init.trunc_normal_(t, std=0.01, a=-0.02, b=0.02)
    return site.zeros(columns, rows) if side == "up" else site.kaiming_uniform(columns, rows)


def multiply(config: BottleneckConfig, p: Tensors, side: str, x: Tensor) -> Tensor:
    """X (..., in) times the matrix of one side, (..., out)."""
    bias = p[f"{side}_bias"].to(x.dtype) if f"{side}_bias" in p else None
    if not config.phm_dim:
        return F.linear(x, p[side].to(x.dtype), bias)
    return F.linear(
        x, kronecker_sum(first_factors(config, p, side), second_factors(config, p, side)).T.to(x.dtype), bias
    )


def first_factors(config: BottleneckConfig, p: Tensors, side: str) -> Tensor:
    at = "" if config.phm_shared_rule else f"{side}_"
    if config.phm_factorized_rule:
        return torch.bmm(p[f"{at}rule_left"], p[f"{at}rule_right"])  # (n, n, n)
    return p[f"{at}rule"]


def second_factors(config: BottleneckConfig, p: Tensors, side: str) -> Tensor:
    left = p[f"{side}_left"]
    return torch.bmm(left, p[f"{side}_right"]) if config.phm_rank else left  # (n, rows / n, columns / n)


def kronecker_sum(first: Tensor, second: Tensor) -> Tensor:
    """sum_i A_i (x) B_i. Mahabadi et al. 2021, eq. 4: (n, n, n) and (n, a, b) -> (n a, n b)."""
    n, a, b = second.shape
    total = torch.einsum("ijk,iab->jakb", first.to(second), second)
    return total.reshape(n * a, n * b)


def norm_output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))


def draw_weights(t: Tensor, std: float) -> Tensor:
    """The tensor filled from a normal distribution; on the meta device, as it is."""
    return t if t.device.type == "meta" else t.normal_(0.0, std)
