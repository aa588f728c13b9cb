"""torchao's tensors: a layer of torch's own whose weight is a quantized tensor subclass.

Read and run for all weight-only formats whose tensors can be dequantized; written again for int8, float8, and
integers of 1 to 8 bits in groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Backend, put_tensor


class TorchAO(Backend):
    name = "torchao"
    holds = "torchao's tensors"

    def matches(self, owner: nn.Module, param: str) -> bool:
        library = sys.modules.get("torchao.utils")
        return library is not None and isinstance(owner._parameters.get(param), library.TorchAOBaseTensor)

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        return self.storage(owner, param).dtype

    def can_write(self, owner: nn.Module, param: str) -> bool:
        return quantizer_like(owner._parameters[param]) is not None

    def read(self, owner: nn.Module, param: str) -> Tensor:
        weight: Any = owner._parameters[param]
        with torch.no_grad():
            value: Tensor = weight.dequantize()
        return value

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        old: Any = owner._parameters[param]
        quantize = quantizer_like(old)
        assert quantize is not None
        with torch.no_grad():
            made = quantize(value.to(device=old.device, dtype=old.dtype))
        owner._parameters[param] = nn.Parameter(made, requires_grad=False)
        return old

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        old: Any = token
        with torch.no_grad():
            value: Tensor = old.dequantize()
        return value

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        put_tensor(owner, param, token)


def quantizer_like(weight: Any) -> Callable[[Tensor], Tensor] | None:
    """A function that quantizes a weight (out, in) as `weight` was, or None if torchao does not keep how."""
    kind = type(weight).__name__
    if kind == "Int8Tensor" and weight.act_quant_scale is None and weight.act_pre_scale is None:
        granularity = granularity_of(weight)
        symmetric = weight.zero_point is None or not bool(weight.zero_point.any())
        mapping = sys.modules["torchao.quantization.quant_primitives"].MappingType
        return lambda value: type(weight).from_hp(
            value,
            granularity,
            mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC,
            act_quant_kwargs=weight.act_quant_kwargs,
            reduce_range=weight.reduce_range,
        )
    if kind == "Float8Tensor":
        granularity = granularity_of(weight)
        return lambda value: type(weight).from_hp(
            value,
            float8_dtype=weight.qdata.dtype,
            granularity=granularity,
            mm_config=weight.mm_config,
            act_quant_kwargs=weight.act_quant_kwargs,
            kernel_preference=weight.kernel_preference,
        )
    if kind == "IntxUnpackedToInt8Tensor" and weight.activation_quantization is None:
        mapping = sys.modules["torchao.quantization.quant_primitives"].MappingType
        symmetric = not bool(weight.zero_point.any())
        return lambda value: type(weight).from_hp(
            value,
            weight.block_size,
            weight.target_dtype,
            mapping_type=mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC,
        )
    return None


def granularity_of(weight: Any) -> Any:
    """Torchao's word for the blocks that share a scale."""
    library = sys.modules["torchao.quantization.granularity"]
    rows, columns = weight.block_size
    if (rows, columns) == tuple(weight.shape):
        return library.PerTensor()
    if rows == 1:
        return library.PerRow() if columns == weight.shape[1] else library.PerGroup(columns)
    return library.PerBlock(list(weight.block_size))
