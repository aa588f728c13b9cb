"""bitsandbytes: int8 rows (Dettmers et al. 2022, arxiv.org/abs/2208.07339) and nf4 / fp4 blocks (Dettmers et al. 2023,
arxiv.org/abs/2305.14314), with and without quantized statistics.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from . import Backend
from .plain import FLOATS


def library() -> Any:
    """bitsandbytes.nn where it was imported, which a layer of it needs, else None."""
    return sys.modules.get("bitsandbytes.nn")


class FourBit(Backend):
    """Linear4bit: two entries a byte, in blocks of one absolute maximum each. W is (out, in)."""

    name = "bitsandbytes 4-bit"
    holds = "bitsandbytes nf4 and fp4"

    def matches(self, owner: nn.Module, param: str) -> bool:
        bnb = library()
        # Not yet quantized, it will be when the layer moves to its device.
        return bnb is not None and isinstance(owner._parameters.get(param), bnb.Params4bit)

    def read(self, owner: nn.Module, param: str) -> Tensor:
        weight: Any = owner._parameters[param]
        if not weight.bnb_quantized:
            return weight.data  # type: ignore[no-any-return]
        return self.dense(owner, weight.data, weight.quant_state)

    def dense(self, owner: nn.Module, packed: Tensor, state: Any) -> Tensor:
        """The weight as the layer evaluates it: in the dtype in which it computes, (out, in)."""
        bnb = sys.modules["bitsandbytes"]
        state = copy.copy(state)
        state.dtype = computes_in(owner, state)
        found: Tensor = bnb.functional.dequantize_4bit(packed, state)
        return found

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        bnb = sys.modules["bitsandbytes"]
        weight: Any = owner._parameters[param]
        before = (weight.data, weight.quant_state)
        old = before[1]
        packed, state = bnb.functional.quantize_4bit(
            value.detach().to(weight.device, torch.float32).contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=weight.quant_storage,
        )
        state.dtype = old.dtype
        put(owner, weight, packed, state)
        return before

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        packed, state = token  # type: ignore[misc]
        put(owner, owner._parameters[param], packed, state)  # type: ignore[has-type]

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        packed, state = token  # type: ignore[misc]
        return self.dense(owner, packed, state)  # type: ignore[has-type]

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        weight: Any = owner._parameters[param]
        return computes_in(owner, weight.quant_state) if weight.bnb_quantized else weight.dtype

    def can_write(self, owner: nn.Module, param: str) -> bool:
        weight: Any = owner._parameters[param]
        return bool(weight.bnb_quantized) and weight.device.type != "meta"

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        weight: Any = owner._parameters[param]
        state = weight.quant_state
        found: Tensor = weight if state is None else state.absmax  # one with each weight that is written
        return found

    def settle(self, module: nn.Module) -> None:
        """Keep the layer off its packed format for evaluation on a CPU.

        The first forward without gradients would change to it for good, rounding the statistics to bfloat16, and from
        then on no gradient goes through the layer.
        """
        bnb = library()
        if bnb is None or not isinstance(module, bnb.Linear4bit):
            return
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            undo = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
            put(module, module.weight, *undo(module.weight.data, state))
        module.support_avx512bf16_for_cpu = False


def computes_in(owner: nn.Module, state: Any) -> torch.dtype:
    """What the layer casts its input to; until the first input says so, the dtype in which it was quantized."""
    found = owner.__dict__.get("compute_dtype") or state.dtype
    assert isinstance(found, torch.dtype)
    return found


def put(owner: nn.Module, weight: Any, packed: Tensor, state: Any) -> None:
    weight.data, weight.quant_state = packed, state
    if "quant_state" in owner.__dict__:
        owner.__dict__["quant_state"] = state


class EightBit(Backend):
    """Linear8bitLt: int8 entries with one absolute maximum a row. W is (out, in).

    The layer multiplies the dequantized weight while it trains on a CPU, and elsewhere int8 by int8.
    """

    name = "bitsandbytes int8"
    holds = "bitsandbytes int8"

    def matches(self, owner: nn.Module, param: str) -> bool:
        bnb = library()
        weight = owner._parameters.get(param)
        # With has_fp16_weights the weight is an ordinary one.
        return bnb is not None and isinstance(weight, bnb.Int8Params) and not weight.has_fp16_weights

    def parts(self, owner: nn.Module, param: str) -> tuple[Tensor, Tensor] | None:
        """Entries (out, in) int8 and maxima (out,), which the first forward moves from the weight to the layer."""
        weight: Any = owner._parameters[param]
        held = owner.state if weight.CB is None else weight
        if held.CB is None or held.SCB is None:  # type: ignore[union-attr]
            return None
        return held.CB, held.SCB  # type: ignore[union-attr,return-value]

    def read(self, owner: nn.Module, param: str) -> Tensor:
        parts = self.parts(owner, param)
        if parts is None:
            weight: Any = owner._parameters[param]
            return weight.data  # type: ignore[no-any-return]
        return self.before(owner, param, parts)

    def write(self, owner: nn.Module, param: str, value: Tensor) -> object:
        bnb = sys.modules["bitsandbytes"]
        before = self.parts(owner, param)
        assert before is not None
        rows = value.detach().to(before[0].device, torch.float16).contiguous()
        self.restore(owner, param, bnb.functional.int8_vectorwise_quant(rows)[:2])
        return before

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        weight: Any = owner._parameters[param]
        held: Any = owner.state if weight.CB is None else weight
        held.CB, held.SCB = token  # type: ignore[misc]
        weight.data = held.CB

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        entries, maxima = token  # type: ignore[misc]
        return entries.to(torch.float32) * (maxima * (1 / 127.0))[:, None]  # type: ignore[has-type,no-any-return]

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        bias = owner._parameters.get("bias")
        return bias.dtype if bias is not None and bias.dtype in FLOATS else torch.float32  # else that of its input

    def can_write(self, owner: nn.Module, param: str) -> bool:
        parts = self.parts(owner, param)
        return parts is not None and parts[0].device.type != "meta"

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        parts = self.parts(owner, param)
        weight = owner._parameters[param]
        assert weight is not None
        return weight if parts is None else parts[1]  # one with each weight that is written
