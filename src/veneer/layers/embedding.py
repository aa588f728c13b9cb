"""nn.Embedding: a matrix (width, vocabulary) applied to one-hot inputs, given as ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.hadamard import Hadamard
from ..algebra.low_rank import Factored
from ..algebra.operator import Operator
from ..algebra.operators import Diagonal
from ..algebra.recursion import Post, Semantics, Terms, evaluate, walk_terms
from ..algebra.rows import SelectedRows
from ..algebra.sums import Sum
from ..backends.base import put_tensor
from ..distributed.sharding import is_distributed
from .geometry import Geometry, Weight
from .kind import Call, LayerKind
from .shallow_copy import shallow_copy


class Embedding(LayerKind):
    name = "Embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        assert isinstance(owner, nn.Embedding)
        return Geometry(owner.num_embeddings, owner.embedding_dim, lookup=True)

    def canonical(self, site: Weight, stored: Tensor) -> Tensor:
        return stored.T  # (vocabulary, width) -> (width, vocabulary)

    def restored(self, site: Weight, matrix: Tensor) -> Tensor:
        return matrix.T

    def forward(
        self, site: Weight, call: Call, target: nn.Module, terms: Terms, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        # R acts on one-hot inputs, which ids cannot show: only a diagonal R can be applied, and to the output,
        # since f(diag(v) onehot(i)) = v_i f(onehot(i)).
        for link in walk_terms(terms):
            if link.right is not None and not isinstance(link.right, Diagonal):
                raise TypeError(f"{site.name}: {type(link.right).__name__} cannot act on the ids of an embedding")
        ids = args[0] if args else next(iter(kwargs.values()))
        return evaluate(terms, LookupSemantics(self, site, call, target), ids, lambda z: sum_parts(call(target, z)))

    def delta(self, site: Weight, op: Operator, x: Tensor, target: nn.Module, call: Call, training: bool) -> Tensor:
        # Ids cannot be dropped, so `op.dropout` has no meaning here; peft ignores it as well.
        dtype = site.float_dtype
        if isinstance(op, Sum):
            return super().delta(site, op, x, target, call, training)
        if isinstance(op, Factored):
            h = op.middle(self.look_up(target, call, op.A.T.to(dtype), x))  # (..., r)
            return op.finish(F.linear(h, op.full_B().to(h.dtype)))  # (..., width)
        if isinstance(op, (SelectedRows, Hadamard)):
            rows = op.lookup(x).to(dtype)  # (..., width)
            padding = getattr(target, "padding_idx", None)
            if isinstance(op, Hadamard) and padding is not None:  # such a row is used and not trained
                rows = torch.where((x == padding)[..., None], rows.detach(), rows)
            table = shallow_copy(target, padding_idx=None)
            return self.scaled_like(table, call, rows, x)
        return self.look_up(target, call, op.dense().T.to(dtype), x)

    def look_up(self, target: nn.Module, call: Call, table: Tensor, ids: Tensor) -> Tensor:
        """The layer's own forward on another table (vocabulary, n), so that a scale in it applies here too."""
        double = shallow_copy(target, max_norm=None)
        put_tensor(double, "weight", table)
        y: Tensor = call(double, ids)
        return y

    def scaled_like(self, target: nn.Module, call: Call, rows: Tensor, ids: Tensor) -> Tensor:
        """Rows already looked up (..., n), passed through the layer's forward as a table of their own."""
        n = rows.shape[-1]
        own = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return self.look_up(target, call, rows.reshape(-1, n), own)


class LookupSemantics(Semantics[Tensor, Tensor]):
    """Terms as changes of what an embedding returns for ids (...): y (..., width)."""

    def __init__(self, kind: Embedding, site: Weight, call: Call, target: nn.Module) -> None:
        self.kind, self.site, self.call, self.target = kind, site, call, target

    def right(self, op: Operator, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = inner(x)
        assert isinstance(op, Diagonal)
        return y * F.embedding(x, op.v.to(y.dtype)[:, None])

    def delta(self, op: Operator, x: Tensor, y: Tensor) -> Tensor:
        training = self.target.training
        op = op.sample() if training else op
        return y + self.kind.delta(self.site, op, x, self.target, self.call, training).to(y.dtype)

    def left(self, op: Operator, y: Tensor) -> Tensor:
        return self.kind.left(self.site, op.sample() if self.target.training else op, y)

    def shift(self, vector: Tensor, y: Tensor) -> Tensor:
        return y + vector.to(y.dtype)

    def post(self, function: Post, x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    def mix(self, y: Tensor, share: float, branch: Tensor, start: Tensor) -> Tensor:
        return y + share * (branch - start)


def sum_parts(y: Tensor) -> Tensor:
    """A lookup in a table that processes split by its rows, as the sum of what each has found."""
    if not is_distributed(y):
        return y
    from torch.distributed.tensor import Replicate

    made: Tensor = y.redistribute(placements=[Replicate()] * y.device_mesh.ndim)
    return made
