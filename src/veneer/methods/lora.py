"""LoRA and DoRA: a low-rank delta, and its form with a separate magnitude.

References:
    Hu et al. 2021, arxiv.org/abs/2106.09685
    Kalajdzievski 2023, arxiv.org/abs/2312.03732 (rank-stabilized scale)
    Liu et al. 2024, arxiv.org/abs/2402.09353 (DoRA)
    Yadav et al. 2023, arxiv.org/abs/2306.01708 (TIES); Yu et al. 2023, arxiv.org/abs/2311.03099 (DARE)
    Meng et al. 2024, arxiv.org/abs/2404.02948 (PiSSA); Büyükakyüz 2024, arxiv.org/abs/2406.01775 (OLoRA)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..algebra.low_rank import Factored, best_rank, fit_factors, low_rank
from ..algebra.operator import Operator
from ..algebra.operators import Diagonal, plain_precision
from ..algebra.sums import Sum
from ..layers.site import Site
from .base import Method
from .checks import check_one_of, check_positive, check_positive_int, check_probability
from .fields import BiasField, LayerFields, PatternFields, TransposedField, require_same
from .full_copy import TrainableTokensConfig
from .hooks import Tensors
from .registry import method
from .task_arithmetic import Combination
from .tensors import BIAS, Constant, Trained


@method(
    "LORA",
    patterns={"rank_pattern": "r", "alpha_pattern": "lora_alpha"},
    foreign={
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "loftq_config": {},
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "velora_config": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "qalora_group_size": 16,
        "monteclora_config": None,
        "layer_replication": None,
        "runtime_config": None,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "ensure_weight_tying": False,
    },
)
@dataclass
class LoraConfig(LayerFields, BiasField, PatternFields, TransposedField, Method):
    """LoRA. Hu et al. 2021, arxiv.org/abs/2106.09685, eq. 3:  W' = W + (alpha / r) B A

    Args:
        r: rank.
        lora_alpha: alpha in the scale alpha / r.
        lora_dropout: probability of dropping an entry of the adapter's input while training.
        use_rslora: scale alpha / sqrt(r) instead.
        init_lora_weights: True (A Kaiming uniform, B zero), False (both random), "gaussian" (A normal with
            standard deviation 1 / r), "pissa", "pissa_niter_<n>" or "olora".
        trainable_token_indices: rows of the embedding to train in full; a list, or {module: list}.
        use_dora: DoRA, eq. 5: W' = m (W + scale B A) / ||W + scale B A||, row by row, the norm held constant in
            the gradient (section 4.3).
        lora_bias: add a trained bias to the B projection.
        target_parameters: names (suffixes) of bare parameters, such as "mlp.experts.gate_up_proj".

    Raises:
        ValueError: a hyper-parameter out of its range, or options that exclude each other.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: list[str] | None = None

    combination: Combination | None = field(default=None, init=False, repr=False, compare=False)  # how it came about

    tensors = {
        "A": Trained("lora_A.weight", axes=("", "in"), embedding="lora_embedding_A"),
        "B": Trained("lora_B.weight", axes=("out", ""), embedding="lora_embedding_B"),
        "B_bias": Trained("lora_B.bias", axes=("out",)),
        "m": Trained("lora_magnitude_vector", axes=("out",), reads=("lora_magnitude_vector.weight",)),
        "bias": BIAS,
        "A0": Constant(axes=("", "in")),
        "B0": Constant(axes=("out", "")),
    }
    recipe = {"learning_rate": 2e-3, "warmup": 10, "target_modules": "all-linear", "lora_alpha": 16}

    def check(self) -> None:
        check_positive_int(self, r=self.r)
        check_positive(self, lora_alpha=self.lora_alpha)
        check_probability(self, lora_dropout=self.lora_dropout)
        check_one_of(self, ("none", "all", "lora_only"), bias=self.bias)
        for name, table in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key, value in (table or {}).items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                    raise ValueError(f"LoraConfig({name}={{{key!r}: {value!r}}}): must be a number above 0")
        how = self.init_lora_weights
        known = how in (True, False, "gaussian", "pissa", "olora") or self.iterations is not None
        if not known:
            raise ValueError(
                f"LoraConfig(init_lora_weights={how!r}): must be True, False, 'gaussian', 'pissa', "
                "'pissa_niter_<n>' or 'olora'"
            )
        if self.lora_bias and (self.use_dora or isinstance(how, str)):
            raise ValueError("LoraConfig(lora_bias=True): cannot be combined with use_dora or a computed start")
        if isinstance(self.target_parameters, str):
            raise TypeError("LoraConfig(target_parameters=...): must be a list of names, not one string")

    @property
    def iterations(self) -> int | None:
        """N of "pissa_niter_<n>", else None."""
        head, _, n = str(self.init_lora_weights).rpartition("_")
        return int(n) if head == "pissa_niter" and n.isdigit() and int(n) > 0 else None

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def init(self, site: Site) -> dict[str, Tensor]:
        r, taps = self.r, (1,) * len(site.kernel)
        if site.groups > 1 and r % site.groups:
            raise ValueError(
                f"{site.name}: r={r} does not divide into the {site.groups} groups of this convolution; choose a "
                "multiple (rank_pattern sets it for one module) or exclude the module"
            )
        if site.experts:
            A = site.kaiming_uniform(r * site.experts, site.fan_in)  # (experts * r, in)
            B = site.zeros(site.fan_out, r * site.experts)  # (out, r * experts)
        elif site.lookup:
            A = site.zeros(r, site.fan_in)  # (r, vocabulary)
            B = site.normal(site.fan_out, r)  # (width, r)
        else:
            A = site.kaiming_uniform(r, site.fan_in, *site.kernel)  # (r, in, *kernel)
            B = site.zeros(site.fan_out, r // site.groups, *taps)  # (out, r / groups, 1...)
        p = {"A": A, "B": B}
        how = self.init_lora_weights
        if how is False and site.lookup:
            p["A"] = site.normal(*A.shape)
        elif how is False:
            p["B"] = site.kaiming_uniform(*B.shape)
        elif how == "gaussian" and not site.lookup:
            p["A"] = site.normal(*A.shape, std=1 / r)
        elif isinstance(how, str) and how != "gaussian" and not site.lookup:  # as in peft, embeddings start at zero
            p |= self.start(site, A.shape, B.shape)
        if self.lora_bias:
            if site.lookup or site.bare:
                raise ValueError(f"{site.name}: lora_bias=True needs a layer that adds its output; set it to False")
            p["B_bias"] = site.zeros(site.fan_out)  # (out,)
        if self.use_dora:
            if site.experts:
                raise ValueError(f"{site.name}: use_dora=True is not defined for stacked experts; set it to False")
            shape = (1, site.fan_out, *taps) if site.kernel else (site.fan_out,)
            p["m"] = site.computed(shape, lambda: self.row_norm(p, site))
        if site.bare and self.lora_dropout and not site.meta:
            warnings.warn(
                f"{site.name}: lora_dropout={self.lora_dropout} cannot act on a weight that its module uses on its "
                "own terms; this place trains without dropout",
                stacklevel=2,
            )
        return p | self.init_bias(site)

    def start(self, site: Site, A_shape: Any, B_shape: Any) -> dict[str, Tensor]:
        """Factors computed from W, and a frozen copy of them: W' = W - scale B0 A0 + scale B A.

        The base keeps its own weight, so disabling, deleting and several adapters stay exact.
        """
        if site.experts or site.groups > 1:
            raise ValueError(
                f"{site.name}: init_lora_weights={self.init_lora_weights!r} needs one dense matrix; use True here"
            )
        how = "olora" if self.init_lora_weights == "olora" else "pissa"
        options = {"iterations": self.iterations} if how == "pissa" else {}
        B, A = site.start(how, self.r, self.scale * site.low_rank_factor, **options)
        B, A = B.reshape(B_shape), A.reshape(A_shape)
        return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}

    def delta(self, p: Tensors, site: Site) -> Operator:
        low = self.factors(p["B"], p["A"], site, self.scale, self.lora_dropout)
        if "A0" not in p:
            return low
        return Sum(low, self.factors(p["B0"], p["A0"], site, -self.scale, 0.0))

    def factors(self, B: Tensor, A: Tensor, site: Site, scale: float, dropout: float) -> Factored:
        if site.experts:
            A = A.view(site.experts, -1, site.fan_in)  # (experts, r, in)
            B = B.view(site.fan_out, -1, site.experts).permute(2, 0, 1)  # (experts, out, r)
        scale *= site.low_rank_factor
        if site.kernel:
            A, B = A.flatten(1), B.flatten(1)  # (r, in * kernel), (out, r / groups)
        return Factored(B, A, scale, dropout=dropout, groups=site.groups)

    def row_norm(self, p: Tensors, site: Site) -> Tensor:
        """||W + scale B A|| of each row, (out,), in float32 at least, without W + scale B A:

        ||W||^2 + 2 scale <W A^T, B> + scale^2 <B (A A^T), B>, row by row; ||W||^2 is kept at the site.
        """
        weight, delta = site.rows(), self.delta(p, site)
        wide = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), p["B"].dtype)
        with plain_precision(weight.device):
            growth = delta.row_growth(weight, wide)  # (out,)
            # Rounding can leave a row that the adapter all but cancels below zero.
            return (site.row_squares() + growth).clamp_min(0).sqrt().to(wide)

    def left(self, p: Tensors, site: Site) -> Operator | None:
        if not self.use_dora:
            return None
        with torch.no_grad():
            norm = self.row_norm(p, site)  # (out,)
        return Diagonal(p["m"].flatten() / norm.to(p["m"].device), scales_bias=False)

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        shift = self.bias_shift(p, site)
        if self.lora_bias:
            low = p["B_bias"] * self.scale  # (out,)
            shift = low if shift is None else shift + low
        return shift

    def companions(self, model: nn.Module) -> list[Method]:
        return super().companions(model) + TrainableTokensConfig.for_rows(model, self.trainable_token_indices or {})

    # Weighted combinations.

    @property
    def largest(self) -> int:
        """The largest rank of a layer; twice it where a share of the base is taken out."""
        r = max([self.r, *(self.rank_pattern or {}).values()])
        return 2 * r if isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian" else r

    def combined(self, others: Sequence[Self], **options: Any) -> Self:
        """One rank for all layers and a scale of 1; `options` are `Combination`'s."""
        configs = [self, *others]
        how = Combination(**options)
        if not others:
            how = Combination("linear")
        if any(c.use_dora for c in configs):
            raise ValueError(
                "LORA: adapters with use_dora=True scale the whole weight, and a combination of them is no low-rank change; "
                "turn each into a plain LoRA first (veneer.convert_to_lora)"
            )
        ranks = [c.largest for c in configs]
        if how.combination_type == "cat":
            r = sum(ranks)
        elif how.by_svd:
            r = how.svd_rank or max(ranks)
        elif len(set(ranks)) > 1:
            raise ValueError(
                f"combination_type={how.combination_type!r} adds up A and B apart and needs adapters of one rank; these have "
                f"{ranks}; use 'cat' or a kind that ends in 'svd'"
            )
        else:
            r = ranks[0]
        for name in ("layers_to_transform", "layers_pattern"):
            require_same(name, [vars(c)[name] for c in configs])
        biases = {c.bias for c in configs}
        made = (
            super()
            .combined(others)
            .replace(
                r=r,
                lora_alpha=r,
                rank_pattern={},
                alpha_pattern={},
                use_rslora=False,
                init_lora_weights=True,
                bias=next(b for b in ("all", "lora_only", "none") if b in biases),
                lora_bias=any(c.lora_bias for c in configs),
                target_parameters=list(dict.fromkeys(n for c in configs for n in c.target_parameters or ())) or None,
                trainable_token_indices=every_row([c.trainable_token_indices for c in configs]),
            )
        )
        made.combination = how
        return made

    def combine(self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site) -> dict[str, Tensor]:
        """See `PeftModel.add_weighted_adapter`; each adapter brings its own scale."""
        how = self.combination or Combination()
        wide = torch.promote_types(parts[0][1]["A"].dtype, torch.float32)
        pairs, factors = [], []  # of each adapter: B (n, out / n, k) and A (n, k, in), and the factor before B A
        for (other, p), weight in zip(parts, weights, strict=True):
            B, A = other.stacked(p, site, wide)
            pairs.append((B, A))
            factors.append(weight * other.scale)
        r = self.r // (max(1, site.groups))
        if how.combination_type == "cat" or (how.combination_type == "svd" and how.svd_clamp is None):
            # The weights go to A, as peft has it.
            B = torch.cat([B for B, _ in pairs], -1)
            A = torch.cat([A * f for (_, A), f in zip(pairs, factors, strict=True)], -2)
            B, A = fit_factors(B, A, r) if how.combination_type == "cat" else low_rank(B, A, r, how.svd_driver)[:2]
        elif how.by_svd:
            scales = [m.scale for m, _ in parts]
            total = how.merged(
                [B @ A * s for (B, A), s in zip(pairs, scales, strict=True)], weights
            )  # (n, out / n, in)
            B, A, _ = best_rank(total, r, how.svd_driver)
            if how.svd_clamp is not None:
                top = clamp_quantile(torch.cat([B.flatten(), A.flatten()]), how.svd_clamp)
                B, A = B.clamp(-top, top), A.clamp(-top, top)
        else:
            roots = [math.sqrt(abs(f)) for f in factors]
            k = max(B.shape[-1] for B, _ in pairs)
            pairs = [fit_factors(B, A, k) for B, A in pairs]
            B = how.merged([B for B, _ in pairs], roots)
            A = how.merged(
                [A for _, A in pairs], [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
            )
            B, A = fit_factors(B, A, r)
        return self.unstacked(B, A, site) | self.combined_biases(parts, weights, site)

    def stacked(self, p: Tensors, site: Site, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B (n, out / n, k) and A (n, k, in): n is the experts or the groups, and B A the change without its scale."""
        low = self.factors(p["B"], p["A"], site, 1.0, 0.0)
        n = site.experts or site.groups
        B, A = low.B.reshape(n, -1, low.B.shape[-1]).to(dtype), low.A.reshape(n, -1, low.A.shape[-1]).to(dtype)
        if "A0" in p:  # scale (B A - B0 A0)
            start = {"A": p["A0"], "B": p["B0"]}
            B0, A0 = self.stacked(start, site, dtype)
            B, A = torch.cat([B, -B0], -1), torch.cat([A, A0], -2)
        return B, A

    def unstacked(self, B: Tensor, A: Tensor, site: Site) -> dict[str, Tensor]:
        """Inverse of `stacked`: the tensors as the file has them."""
        if site.experts:
            return {"A": A.reshape(-1, site.fan_in), "B": B.permute(1, 2, 0).reshape(site.fan_out, -1)}
        taps = (1,) * len(site.kernel)
        shape = (site.fan_in, *site.kernel)
        return {"A": A.reshape(-1, *shape), "B": B.reshape(site.fan_out, -1, *taps)}

    def combined_biases(
        self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site
    ) -> dict[str, Tensor]:
        """The weighted sums of what trained biases and `lora_bias` add to the output."""
        found = {}
        pairs = [(m, p, w) for (m, p), w in zip(parts, weights, strict=True)]
        if self.lora_bias:
            added = [p["B_bias"] * (m.scale * w) for m, p, w in pairs if "B_bias" in p]  # (out,) each
            found["B_bias"] = torch.stack(added).sum(0) if added else torch.zeros(site.fan_out)
        if self.init_bias(site):
            shifts = [(m.bias_shift(p, site), w) for m, p, w in pairs]
            own: Any = site.bias
            found["bias"] = own + sum((s * w for s, w in shifts if s is not None), torch.zeros_like(own))
        return found


def every_row(given: Sequence[Any]) -> Any:
    """What several `trainable_token_indices` mean together."""
    given = [g for g in given if g]
    if not given:
        return None
    if all(isinstance(g, Mapping) for g in given):
        return {n: every_row([g.get(n) for g in given]) for n in dict.fromkeys(n for g in given for n in g)}
    if any(isinstance(g, Mapping) for g in given):
        raise ValueError(
            f"trainable_token_indices is a list for some of these adapters and a dict for others ({given!r}); adapters can "
            "be combined where it is the same kind for all"
        )
    return list(dict.fromkeys(i for g in given for i in g))


def clamp_quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of values (n,), between neighbours; torch's own stops at 16 million values."""
    ordered = values.sort().values
    place = q * (ordered.numel() - 1)
    low = int(place)
    high = min(low + 1, ordered.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)
