"""One row a method, one row a layer. Every test of `test_table.py` runs on the product of the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import veneer

NAME = "layer"  # the adapted module in every row's model


class PaddedConv(nn.Conv2d):
    """A convolution that pads its own input, as EfficientNet's do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its output, as Gemma's does."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Holder(nn.Module):
    """A weight that its module uses on its own terms."""

    def __init__(self, *shape: int, transposed: bool = False) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape) / 4)
        self.is_transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix.transpose(-1, -2) if self.is_transposed else self.matrix
        y = torch.einsum("...i,eoi->...eo", x, matrix) if matrix.ndim == 3 else x @ matrix.T
        return y.flatten(-2) if matrix.ndim == 3 else y


class Attention(nn.MultiheadAttention):
    """Attention that takes one input, so that every row is called alike."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


@dataclass
class Layer:
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    bare: str = ""  # name for target_parameters
    tags: set[str] = field(default_factory=set)


@dataclass
class Row:
    make: Callable[..., Any]
    identity: bool = True  # a fresh adapter changes nothing
    not_for: set[str] = field(default_factory=set)  # layer tags with a clear refusal, or no field to name them by
    refused: str = ""  # what the refusal says
    norms: bool = False  # it is for normalisation layers too
    merges: bool = True  # it can be baked into the weights


def ids() -> Tensor:
    return torch.randint(0, 12, (3, 5))


class ShiftedRMSNorm(nn.Module):
    """A norm of no class that torch knows, which adds one to its scale, as Gemma's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


LAYERS: dict[str, Layer] = {
    "layer_norm": Layer(lambda: nn.LayerNorm(8), lambda: torch.randn(2, 3, 8), tags={"norm"}),
    "rms_norm": Layer(lambda: ShiftedRMSNorm(8), lambda: torch.randn(2, 3, 8), tags={"norm", "no_bias"}),
    "group_norm": Layer(lambda: nn.GroupNorm(2, 8), lambda: torch.randn(2, 8, 4), tags={"norm"}),
    "batch_norm": Layer(lambda: nn.BatchNorm1d(8), lambda: torch.randn(2, 8, 4), tags={"norm"}),
    "linear": Layer(lambda: nn.Linear(8, 12), lambda: torch.randn(2, 3, 8)),
    "linear_no_bias": Layer(lambda: nn.Linear(8, 12, bias=False), lambda: torch.randn(2, 8), tags={"no_bias"}),
    "conv1d_gpt2": Layer(lambda: Conv1D(12, 8), lambda: torch.randn(2, 3, 8)),
    "conv1d": Layer(lambda: nn.Conv1d(4, 8, 3, padding=1), lambda: torch.randn(2, 4, 6), tags={"conv"}),
    "conv2d": Layer(lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 6, 6), tags={"conv"}),
    "conv2d_reflect": Layer(
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(2, 4, 6, 6), tags={"conv"}
    ),
    "conv2d_1x1": Layer(lambda: nn.Conv2d(4, 8, 1), lambda: torch.randn(2, 4, 5, 5), tags={"conv"}),
    "conv2d_dilated": Layer(lambda: nn.Conv2d(4, 8, 3, dilation=2), lambda: torch.randn(2, 4, 8, 8), tags={"conv"}),
    "conv3d": Layer(lambda: nn.Conv3d(4, 8, 2), lambda: torch.randn(1, 4, 4, 4, 4), tags={"conv"}),
    "conv2d_grouped": Layer(
        lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), lambda: torch.randn(2, 8, 5, 5), tags={"grouped", "conv"}
    ),
    "conv2d_depthwise": Layer(
        lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: torch.randn(2, 4, 5, 5), tags={"grouped", "conv"}
    ),
    "conv2d_own_padding": Layer(lambda: PaddedConv(4, 8, 2), lambda: torch.randn(2, 4, 5, 5), tags={"conv"}),
    "embedding": Layer(lambda: nn.Embedding(12, 8, padding_idx=0), ids, tags={"lookup"}),
    "embedding_scaled": Layer(lambda: ScaledEmbedding(12, 8), ids, tags={"lookup"}),
    "attention": Layer(lambda: Attention(8, 2, batch_first=True), lambda: torch.randn(2, 5, 8), tags={"bare"}),
    "parameter_2d": Layer(lambda: Holder(12, 8), lambda: torch.randn(3, 8), bare="layer.matrix", tags={"bare"}),
    "experts": Layer(
        lambda: Holder(4, 12, 8), lambda: torch.randn(3, 8), bare="layer.matrix", tags={"bare", "experts"}
    ),
    "experts_transposed": Layer(
        lambda: Holder(4, 8, 12, transposed=True),
        lambda: torch.randn(3, 8),
        bare="layer.matrix",
        tags={"bare", "experts"},
    ),
}


def row(
    config: str,
    *,
    identity: bool = True,
    not_for: str = "",
    refused: str = "",
    norms: bool = False,
    merges: bool = True,
    **options: Any,
) -> Row:
    def make(**names: Any) -> Any:
        return getattr(veneer, config)(**options, **names)

    return Row(make, identity, set(not_for.split()), refused, norms, merges)


# "parameter": methods whose config has no target_parameters, as in peft.
METHODS: dict[str, Row] = {
    "lora": row("LoraConfig", r=4, lora_alpha=6),
    "lora_random": row("LoraConfig", r=4, init_lora_weights=False, identity=False),
    "lora_gaussian": row("LoraConfig", r=4, init_lora_weights="gaussian"),
    "lora_rslora": row("LoraConfig", r=4, lora_alpha=6, use_rslora=True),
    "lora_bias": row(
        "LoraConfig", r=4, lora_bias=True, not_for="lookup bare no_bias", refused="lora_bias|has none to merge"
    ),
    "lora_trained_bias": row("LoraConfig", r=4, bias="lora_only"),
    "lora_pissa": row(
        "LoraConfig", r=2, init_lora_weights="pissa", not_for="grouped experts", refused="one dense|does not divide"
    ),
    "lora_pissa_fast": row(
        "LoraConfig",
        r=2,
        init_lora_weights="pissa_niter_4",
        not_for="grouped experts",
        refused="one dense|does not divide",
    ),
    "lora_olora": row(
        "LoraConfig", r=2, init_lora_weights="olora", not_for="grouped experts", refused="one dense|does not divide"
    ),
    "dora": row("LoraConfig", r=4, use_dora=True, not_for="experts", refused="stacked experts"),
    "loha": row("LoHaConfig", r=3, alpha=4, not_for="parameter"),
    "loha_core": row("LoHaConfig", r=3, use_effective_conv2d=True, not_for="parameter"),
    "ia3": row("IA3Config", feedforward_modules=[], not_for="parameter"),
    "ia3_input": row("IA3Config", feedforward_modules=[NAME], not_for="parameter"),
    "oft": row("OFTConfig", oft_block_size=4, not_for="parameter"),
    "oft_exact": row("OFTConfig", oft_block_size=4, use_cayley_neumann=False, not_for="parameter"),
    "oft_shared": row("OFTConfig", oft_block_size=2, block_share=True, not_for="parameter"),
    "oft_blocks": row("OFTConfig", r=2, oft_block_size=0, not_for="parameter"),
    "oft_constrained": row("OFTConfig", oft_block_size=4, coft=True, eps=1e-2, not_for="parameter"),
    "vera": row("VeraConfig", r=5, not_for="parameter"),
    "ln_tuning": row("LNTuningConfig", not_for="bare", norms=True),  # bare: attention, which it refuses
    "bitfit": row("BitFitConfig", not_for="parameter no_bias lookup", norms=True),
    "modules_to_save": row("LoraConfig", r=2, modules_to_save=[NAME], not_for="bare_name", norms=True),
    "bottleneck": row("BottleneckConfig", width=3, activation="gelu", not_for="conv parameter", merges=False),
    "bottleneck_random": row(
        "BottleneckConfig",
        width=3,
        activation="tanh",
        init_weights="bert",
        layer_norm="both",
        scaling="channel",
        gating=True,
        identity=False,
        not_for="conv parameter not_sequence",
        merges=False,
    ),
    "bottleneck_parallel": row(
        "BottleneckConfig",
        kind="parallel",
        width=4,
        activation="gelu",
        scaling="learned",
        not_for="conv parameter lookup",
        merges=False,
    ),
    "compacter": row("BottleneckConfig", kind="compacter", width=4, phm_dim=2, not_for="conv parameter", merges=False),
    "compacter_shared": row(
        "BottleneckConfig",
        kind="compacter",
        width=4,
        phm_dim=2,
        phm_factorized_rule=True,
        phm_shared_weights=True,
        phm_rank=2,
        not_for="conv parameter",
        merges=False,
    ),
    "tokens": row("TrainableTokensConfig", token_indices=[1, 4, 7], not_for="not_lookup"),
}
