"""One row a storage format: how its library makes a layer of it from a plain one. `test_backends.py` runs the methods on
each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN, OUT, GROUP = 64, 96, 32


@dataclass
class Format:
    """A storage format.

    Attributes:
        make: a plain layer (OUT, IN) -> one that stores the same weight in this format.
        library: what has to be installed.
        weight: the weight with which the layer computes, by the library's own word, (OUT, IN).
        writes: a merged weight can be quantized again.
        runs: the layer has a forward on a CPU.
        bias_is_no_parameter: the layer holds its bias as a buffer or a plain attribute.
        near: how far its outputs may be from a product with `weight`, over the largest.
        note: for the support table.
    """

    make: Callable[[nn.Linear], nn.Module]
    library: str
    weight: Callable[[Any], Tensor]
    writes: bool = True
    runs: bool = True
    bias_is_no_parameter: bool = False
    near: float = 1e-5
    note: str = ""

    @property
    def installed(self) -> bool:
        return not self.library or importlib.util.find_spec(self.library) is not None


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT).requires_grad_(False)


def hqq(bits: int, axis: int = 1) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
        made: nn.Module = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        return made

    return make


def torchao(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from torchao import quantization

        if "group" in options:
            options["granularity"] = quantization.PerGroup(options.pop("group"))
        holder = nn.Sequential(layer)
        quantization.quantize_(holder, getattr(quantization, name)(**options))
        return holder[0].requires_grad_(False)

    return make


def quanto(name: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from optimum import quanto as library

        holder = nn.Sequential(layer)
        library.quantize(holder, weights=getattr(library, name))
        library.freeze(holder)
        return holder[0].requires_grad_(False)

    return make


def bnb4(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        made = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type=kind, compress_statistics=True)
        made.weight = bnb.nn.Params4bit(
            layer.weight.data.clone(), requires_grad=False, quant_type=kind, compress_statistics=True
        )
        made.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
        return made.to("cpu")

    return make


def bnb8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
    return made.to("cpu")


def dequantized4(layer: Any) -> Tensor:
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def dequantized8(layer: Any) -> Tensor:
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scale.float()[:, None] / 127


class PackedLinear(nn.Module):
    """A layer in the layout of gptqmodel's, which multiplies by the weight that was packed into it.

    The packing is written here on its own, number by number.
    """

    QUANT_TYPE = "torch"

    def __init__(
        self, layer: nn.Linear, bits: int, *, version: int = 1, shuffled: bool = False, awq: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = IN, OUT, bits, GROUP
        self.version = version
        generator = torch.Generator().manual_seed(1)
        groups = torch.arange(IN) // GROUP  # of each input
        if shuffled:
            groups = groups[torch.randperm(IN, generator=generator)]
        count, top = IN // GROUP, 2**bits - 1
        q = torch.randint(0, top + 1, (IN, OUT), generator=generator)
        z = torch.randint(1, top + 1, (count, OUT), generator=generator)
        scales = torch.rand(count, OUT, generator=generator) / (8 * top) + 1 / (16 * top)
        known = torch.empty(OUT, IN)
        for i in range(IN):
            known[:, i] = (q[i] - z[groups[i]]) * scales[groups[i]]
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("scales", scales)
        if awq:
            self.register_buffer("qweight", words([awq_order(r) for r in q.tolist()], bits))
            self.register_buffer("qzeros", words([awq_order(r) for r in z.tolist()], bits))
        else:
            stored = z - 1 if version == 1 else z
            self.register_buffer("qweight", words(q.T.tolist(), bits).T.contiguous())
            self.register_buffer("qzeros", words(stored.tolist(), bits))
            self.register_buffer("g_idx", groups.int())
        self.register_buffer("bias", layer.bias.data.clone())

    def qzero_format(self) -> int:
        return self.version

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.known, self.bias)


def awq_order(row: list[int]) -> list[int]:
    """Each run of eight: first those at even places, then those at odd ones."""
    return [v for i in range(0, len(row), 8) for v in (*row[i : i + 8 : 2], *row[i + 1 : i + 8 : 2])]


def words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row of integers as one long number, the first in its lowest bits, cut into words of 32 bits, int32."""
    made = []
    for row in rows:
        number = sum(value << (bits * at) for at, value in enumerate(row))
        cut = [(number >> at) & 0xFFFFFFFF for at in range(0, bits * len(row), 32)]
        made.append([w - (1 << 32) if w >> 31 else w for w in cut])
    return torch.tensor(made, dtype=torch.int32)


def packed(bits: int, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    return lambda layer: PackedLinear(layer, bits, **options)


def fp8(layer: nn.Linear) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    made = FP8Linear(IN, OUT, block_size=(GROUP, GROUP), has_bias=True)
    scale = layer.weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP)).abs().amax((1, 3)) / 448  # (3, 2)
    wide = scale.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    made.weight.data = (layer.weight / wide).to(torch.float8_e4m3fn)
    made.weight_scale_inv.data = scale
    made.bias.data = layer.bias.data.clone()
    return made.requires_grad_(False)


def fp8_weight(layer: Any) -> Tensor:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    value: Tensor = _dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, layer.block_size, torch.float32)
    return value


def own(layer: Any) -> Tensor:
    return layer.weight.dequantize()


NOT_HERE = "gptqmodel does not install on a CPU: tested on layers of its layout"

FORMATS: dict[str, Format] = {
    "bnb int8": Format(bnb8, "bitsandbytes", dequantized8, near=6e-2),  # it rounds the inputs too
    "bnb nf4": Format(bnb4("nf4"), "bitsandbytes", dequantized4),
    "bnb fp4": Format(bnb4("fp4"), "bitsandbytes", dequantized4),
    "HQQ 4 bit": Format(hqq(4), "hqq", lambda layer: layer.dequantize(), bias_is_no_parameter=True),
    "HQQ 8 bit": Format(hqq(8, axis=0), "hqq", lambda layer: layer.dequantize(), bias_is_no_parameter=True),
    "torchao int8": Format(torchao("Int8WeightOnlyConfig"), "torchao", own, near=5e-4),
    "torchao float8": Format(torchao("Float8WeightOnlyConfig"), "torchao", own),
    "torchao int4": Format(torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=GROUP), "torchao", own),
    "quanto int8": Format(quanto("qint8"), "optimum.quanto", own),
    "quanto int4": Format(quanto("qint4"), "optimum.quanto", own),
    "quanto float8": Format(quanto("qfloat8"), "optimum.quanto", own),
    "GPTQ": Format(packed(4, shuffled=True), "", lambda layer: layer.known, writes=False, bias_is_no_parameter=True, note=NOT_HERE),
    "AWQ": Format(packed(4, awq=True), "", lambda layer: layer.known, writes=False, bias_is_no_parameter=True, note=NOT_HERE),
    "fp8": Format(fp8, "transformers", fp8_weight, runs=False, note="transformers' kernel needs a GPU"),
}  # fmt: skip
