"""bitsandbytes: int8 rows (Dettmers et al. 2022, arxiv.org/abs/2208.07339) and nf4 / fp4 blocks (Dettmers et al. 2023,
arxiv.org/abs/2305.14314), with and without quantized statistics.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..distributed.sharding import gathered
from .base import Backend, tensor_of
from .plain import FLOATS


class QuantState(Protocol):
    """Statistics of a 4-bit weight's blocks."""

    absmax: Tensor
    dtype: torch.dtype
    blocksize: int
    nested: bool
    quant_type: str


class Weight4bit(Protocol):
    """bitsandbytes' Params4bit, by the attributes that are read here."""

    data: Tensor
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool


def imported_library() -> Any:
    """bitsandbytes.nn if it was imported, which every layer of it needs, else None."""
    return sys.modules.get("bitsandbytes.nn")


class FourBit(Backend):
    """Linear4bit: two entries a byte, in blocks of one absolute maximum each. W is (out, in)."""

    name = "bitsandbytes 4-bit"
    holds = "bitsandbytes nf4 and fp4"

    def matches(self, owner: nn.Module, param: str) -> bool:
        bnb = imported_library()
        # Not yet quantized, it will be when the layer moves to its device.
        return bnb is not None and isinstance(owner._parameters.get(param), bnb.Params4bit)

    def read(self, owner: nn.Module, param: str) -> Tensor:
        weight, state = owner._parameters[param], self.state(owner, param)
        assert weight is not None
        packed = gathered(weight.data)
        if state is None:
            return packed
        self.gathered(owner, param)
        return self.dense(owner, packed, state)

    def state(self, owner: nn.Module, param: str) -> Any:
        """Statistics of the blocks, or None of a weight that is not quantized yet.

        If fully_shard splits the packed entries, it replaces the library's parameter by a plain one without statistics; every process has all of them in the layer.
        """
        found = getattr(owner._parameters[param], "quant_state", None)
        return owner.__dict__.get("quant_state") if found is None else found

    def dense(self, owner: nn.Module, packed: Tensor, state: QuantState) -> Tensor:
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
        put_packed(owner, weight, packed, state)
        return before

    def restore(self, owner: nn.Module, param: str, token: object) -> None:
        packed, state = cast(tuple[Tensor, QuantState], token)
        put_packed(owner, cast(Weight4bit, owner._parameters[param]), packed, state)

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        packed, state = cast(tuple[Tensor, QuantState], token)
        return self.dense(owner, packed, state)

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        weight: Any = owner._parameters[param]
        state = self.state(owner, param)
        return weight.dtype if state is None else computes_in(owner, state)

    def can_write(self, owner: nn.Module, param: str) -> bool:
        weight: Any = owner._parameters[param]
        return self.matches(owner, param) and bool(weight.bnb_quantized) and weight.device.type != "meta"

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        weight: Any = owner._parameters[param]
        state = self.state(owner, param)
        found: Tensor = weight if state is None else state.absmax  # one with each weight that is written
        return found

    def settle(self, module: nn.Module) -> None:
        """Keep the layer off its packed format for evaluation on a CPU.

        The first forward without gradients would change to it for good, rounding the statistics to bfloat16, and from
        then on no gradient goes through the layer.
        """
        bnb = imported_library()
        if bnb is None or not isinstance(module, bnb.Linear4bit):
            return
        state: Any = getattr(module.weight, "quant_state", None)
        if module.quant_state is None:
            module.quant_state = state  # which fully_shard takes from the weight
        if getattr(state, "packing_format_for_cpu", False):
            undo = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
            put_packed(module, module.weight, *undo(module.weight.data, state))
        module.support_avx512bf16_for_cpu = False

    def gathered(self, owner: nn.Module, param: str) -> None:
        bnb = imported_library()
        if bnb is None or not isinstance(owner, bnb.Linear4bit) or self.state(owner, param) is None:
            return
        weight: Any = owner._parameters[param]
        if not self.matches(owner, param) and weight.dtype != owner.quant_storage:
            raise RuntimeError(
                f"the 4-bit entries of a {type(owner).__name__} are packed as {owner.quant_storage} and came as "
                f"{weight.dtype}: fully_shard's mixed precision rounded them, as if they were numbers; quantize with "
                f"bnb_4bit_quant_storage=torch.uint8, or one of {weight.dtype} as MixedPrecisionPolicy's param_dtype"
            )


def computes_in(owner: nn.Module, state: QuantState) -> torch.dtype:
    """The dtype to which the layer casts its input; until the first input sets it, the dtype that was quantized."""
    found = owner.__dict__.get("compute_dtype") or state.dtype
    assert isinstance(found, torch.dtype)
    return found


def put_packed(owner: nn.Module, weight: Weight4bit, packed: Tensor, state: QuantState) -> None:
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
        bnb = imported_library()
        weight = owner._parameters.get(param)
        # With has_fp16_weights the weight is an ordinary one.
        return bnb is not None and isinstance(weight, bnb.Int8Params) and not weight.has_fp16_weights

    def parts(self, owner: nn.Module, param: str) -> tuple[Tensor, Tensor] | None:
        """Entries (out, in) int8 and maxima (out,), which the first forward moves from the weight to the layer."""
        weight: Any = owner._parameters[param]
        held: Any = owner.state if weight.CB is None else weight
        return None if held.CB is None or held.SCB is None else (held.CB, held.SCB)

    def read(self, owner: nn.Module, param: str) -> Tensor:
        parts = self.parts(owner, param)
        if parts is None:
            return tensor_of(owner, param).data
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
        held.CB, held.SCB = cast(tuple[Tensor, Tensor], token)
        weight.data = held.CB

    def before(self, owner: nn.Module, param: str, token: object) -> Tensor:
        entries, maxima = cast(tuple[Tensor, Tensor], token)  # (out, in) int8, (out,)
        return entries.to(torch.float32) * (maxima * (1 / 127.0))[:, None]  # (out, in)

    def dtype(self, owner: nn.Module, param: str) -> torch.dtype:
        bias = owner._parameters.get("bias")
        return bias.dtype if bias is not None and bias.dtype in FLOATS else torch.float32  # else that of its input

    def can_write(self, owner: nn.Module, param: str) -> bool:
        parts = self.parts(owner, param)
        return parts is not None and parts[0].device.type != "meta"

    def gathered(self, owner: nn.Module, param: str) -> None:
        bnb = imported_library()
        if bnb is None or not isinstance(owner, bnb.Linear8bitLt) or owner.state.has_fp16_weights:
            return
        if not isinstance(owner._parameters[param], bnb.Int8Params):
            raise RuntimeError(
                f"fully_shard split the int8 weight of a {type(owner).__name__}, and the layer needs the library's own; "
                "quantize to nf4, or keep these weights whole in every process: fully_shard(module, "
                "ignored_params={p for p in model.parameters() if p.dtype == torch.int8}), on each module"
            )

    def storage(self, owner: nn.Module, param: str) -> Tensor:
        parts = self.parts(owner, param)
        weight = owner._parameters[param]
        assert weight is not None
        return weight if parts is None else parts[1]  # one with each weight that is written
