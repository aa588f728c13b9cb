"""A site: one adapted weight of the base model, with the factories of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..algebra.cached import Kept
from ..algebra.starts import START
from ..backends.base import held_tensor
from ..distributed import offload
from ..distributed.sharding import gathered
from .factories import TensorFactory
from .geometry import ResidualTap

if TYPE_CHECKING:
    from ..targets.blocks import SublayerOutput
    from .kind import LayerKind


@dataclass(slots=True)
class MergeBackup:
    """A base weight, and its bias, from before a merge, with what brings their exact bits back."""

    weight: Tensor | None  # None where it is packed: the token holds it
    bias: Tensor | None
    token: object
    bias_token: object = None
    parameter: nn.Parameter | None = None  # the tied Parameter that merging replaced by one of its own
    groups: int = 1


class Site(TensorFactory):
    """One adapted place: a layer's weight or a bare parameter.

    Methods read its geometry and make their tensors with its factories; nothing here knows a method.

    Attributes:
        name: dotted name of the module (or `module.parameter`) in the base model.
        key: the same place in peft's files, below `base_model.model.`.
        owner: the module that holds the weight and the adapter's tensors.
        param: name of the weight on `owner`.
    """

    def __init__(self, name: str, key: str, owner: nn.Module, param: str, kind: LayerKind, backend: Any) -> None:
        self.name, self.key, self.owner, self.param = name, key, owner, param
        self.kind, self.backend = kind, backend
        self.geometry = geometry = kind.measure(owner, param)
        # Under the names that methods use.
        self.fan_in, self.fan_out, self.kernel = geometry.fan_in, geometry.fan_out, geometry.kernel
        self.groups, self.experts = geometry.groups, geometry.experts
        self.lookup, self.bare = geometry.lookup, geometry.bare
        self.role = ""  # of a stack: "model", "encoder" or "decoder"
        self.near = owner  # the module whose dtype and device are meant where the owner has no tensors
        self.spot: SublayerOutput | None = None  # the place in its block, where the site is a place in a block
        self.tap = ResidualTap()  # the residual stream there
        self.norm: nn.Module | None = None  # the norm behind the residual's sum there
        self.original: MergeBackup | None = None  # while adapters are merged
        self.squares = Kept()  # of the weight's rows

    @property
    def low_rank_factor(self) -> float:
        return self.kind.low_rank_factor

    @property
    def patch(self) -> int:
        """Columns of the weight as a matrix: fan_in times the kernel's size."""
        return self.fan_in * math.prod(self.kernel)

    @property
    def bias(self) -> Tensor | None:
        """The frozen base bias (fan_out,) without any merged adapter, or None."""
        if not self.geometry.bias:
            return None
        return self.current_bias() if self.original is None else self.original.bias

    def weight(self) -> Tensor:
        """The frozen base weight as a matrix (fan_out, patch), (experts, out, in) for experts.

        It is the weight without any merged adapter, in its stored dtype, and never copied for plain weights.
        """
        return self.kind.canonical(self, self.stored())

    def stored(self) -> Tensor:
        """The frozen base weight as the layer stores it, without any merged adapter."""
        original, stored = self.original, None
        if original is not None:
            stored = original.weight
            if stored is None and original.token is not None:
                stored = self.backend.before(self.owner, self.param, original.token)
        found: Tensor = self.backend.read(self.owner, self.param) if stored is None else stored
        return found

    def stored_rows(self, index: Tensor) -> Tensor:
        """Some rows of `stored()`, (k, ...), whole in every process also where it is split."""
        weight = self.stored()
        return gathered(weight.index_select(0, index.to(weight.device)))

    def matrix(self, stored: Tensor) -> Tensor:
        """A tensor in the layer's own layout as a matrix, as `weight()` is of `stored()`."""
        return self.kind.canonical(self, stored)

    def rows(self) -> Tensor:
        """`weight()`, of a grouped convolution without the zeros off its groups: (fan_out, patch / groups)."""
        return self.stored().flatten(1) if self.groups > 1 else self.weight()

    def row_squares(self) -> Tensor:
        """Squared length of each row of `weight()`, (fan_out,), in float64 where the device has it.

        Computed when the weight changes, not on every call.
        """
        packed = self.backend.packed
        source = None if self.original is None else self.original.weight
        if self.original is None and (packed or self.param in self.owner._parameters):
            source = self.backend.storage(self.owner, self.param)
        if source is None or (source.device.type == "meta" and not packed):
            source = self.stored()  # offloaded, or packed and merged

        def squares() -> Tensor:
            rows = self.rows().detach()
            wide = torch.float64 if rows.device.type in ("cpu", "cuda", "meta") else torch.float32
            norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)  # no wide copy of the weight is made
            return norm.square()

        return self.squares.get(source, squares)

    def current_weight(self) -> Tensor:
        """The layer's weight as a matrix, with whatever is merged into it."""
        return self.kind.canonical(self, self.backend.read(self.owner, self.param))

    def current_bias(self) -> Tensor | None:
        """The layer's bias, with whatever is merged into it."""
        if not self.geometry.bias:
            return None
        name, bias = self.kind.bias, held_tensor(self.owner, self.kind.bias)
        if bias is not None and bias.device.type == "meta":
            fetched = offload.fetch_offloaded(self.owner, name)
            return bias if fetched is None else fetched
        return bias

    @property
    def reference(self) -> Tensor:
        """The tensor whose device the adapter's follow, and dtype: the weight, or a module's first one that has any."""
        if self.backend is not None:
            weight: Tensor = self.backend.storage(self.owner, self.param)
            return weight
        found = next((p for p in own_parameters(self.near) if p.is_floating_point()), None)
        return next(own_parameters(self.near), torch.empty(0)) if found is None else found

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""
        if self.backend is not None:
            dtype: torch.dtype = self.backend.dtype(self.owner, self.param)
            return dtype
        dtype = self.reference.dtype
        return dtype if dtype.is_floating_point else torch.float32

    @property
    def home(self) -> torch.device:
        """Where the adapter's tensors live: the weight's device, or where an offloaded layer computes."""
        device = offload.execution_device(self.owner)
        if device is None and self.near is not self.owner:
            found = (offload.execution_device(m) for m in self.near.modules())
            device = next((d for d in found if d is not None), None)
        return self.reference.device if device is None else device

    def start(self, how: str, r: int, scale: float, **options: object) -> tuple[Tensor, Tensor]:
        """Starting factors (B, A) computed from the base weight, scale * B A being their share of it."""
        weight = gathered(self.weight().detach())
        device = self.home
        if weight.device.type == "meta":  # a skeleton: shapes are all there is
            return self.empty(weight.shape[0], r), self.empty(r, weight.shape[1])
        with torch.no_grad():
            B, A = START[how](weight.float(), r, scale, **options)
        return B.to(device=device, dtype=self.dtype).contiguous(), A.to(device=device, dtype=self.dtype).contiguous()

    def adapter(self, name: str) -> tuple[object, Mapping[str, Tensor]] | None:
        """The method and the tensors of another adapter here, or None if it has none."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {type(self.owner).__name__}, ({self.fan_out}, {self.patch}))"


def own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """A module's parameters without its adapters', which another thread may attach meanwhile."""
    for name, parameter in dict(module._parameters).items():
        if parameter is not None and ":" not in name:
            yield parameter
    for name, child in dict(module._modules).items():
        if child is not None and ":" not in name:
            yield from own_parameters(child)
