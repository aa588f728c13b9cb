"""nn.Embedding: a matrix (width, vocabulary) applied to one-hot inputs, given as ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.hadamard import Hadamard
from ..algebra.low_rank import Factored
from ..algebra.operators import Diagonal, Operator
from ..algebra.recursion import Branches, walk_terms
from ..algebra.rows import SelectedRows
from ..algebra.sums import Sum
from ..distributed.sharding import is_distributed
from .geometry import Geometry
from .kind import LayerKind
from .shallow_copy import shallow_copy

if TYPE_CHECKING:
    from ..injection.dispatch import AdaptedState
    from .kind import Links
    from .site import Site


class Embedding(LayerKind):
    name = "Embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def measure(self, owner: nn.Module, param: str) -> Geometry:
        assert isinstance(owner, nn.Embedding)
        return Geometry(owner.num_embeddings, owner.embedding_dim, lookup=True)

    def canonical(self, site: Site, stored: Tensor) -> Tensor:
        return stored.T  # (vocabulary, width) -> (width, vocabulary)

    def restored(self, site: Site, matrix: Tensor) -> Tensor:
        return matrix.T

    def forward(
        self, site: Site, state: AdaptedState, target: nn.Module, links: Links, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        # R acts on one-hot inputs, which ids cannot show: only a diagonal R can be applied, and to the output,
        # since f(diag(v) onehot(i)) = v_i f(onehot(i)).
        for link in walk_terms(links):
            if link.right is not None and not isinstance(link.right, Diagonal):
                raise TypeError(f"{site.name}: {type(link.right).__name__} cannot act on the ids of an embedding")
        ids = args[0] if args else next(iter(kwargs.values()))
        return self.along(site, state, target, links, ids, summed(state.call(target, ids)))

    def along(self, site: Site, state: AdaptedState, target: nn.Module, links: Links, ids: Tensor, y: Tensor) -> Tensor:
        """The embedding's output after `links`."""
        for link in links:
            if isinstance(link, Branches):  # f + sum_i w_i (f_i - f)
                start = y
                for share, branch in link.branches:
                    y = y + share * (self.along(site, state, target, branch, ids, start) - start)
                continue
            if isinstance(link.right, Diagonal):
                y = y * F.embedding(ids, link.right.v.to(y.dtype)[:, None])
            if link.delta is not None:
                op = link.delta.sample() if target.training else link.delta
                y = y + self.delta(site, op, ids, target, state, target.training).to(y.dtype)
            if link.left is not None:
                y = self.left(site, link.left.sample() if target.training else link.left, y)
            if link.shift is not None:
                y = y + link.shift.to(y.dtype)
            if link.post is not None:
                y = link.post(ids, y)
        return y

    def delta(
        self, site: Site, op: Operator, x: Tensor, target: nn.Module, state: AdaptedState, training: bool
    ) -> Tensor:
        # Ids cannot be dropped, so `op.dropout` has no meaning here; peft ignores it as well.
        dtype = site.float_dtype
        if isinstance(op, Sum):
            return super().delta(site, op, x, target, state, training)
        if isinstance(op, Factored):
            h = op.middle(self.look_up(target, state, op.A.T.to(dtype), x))  # (..., r)
            return op.finish(F.linear(h, op.full_B().to(h.dtype)))  # (..., width)
        if isinstance(op, (SelectedRows, Hadamard)):
            rows = op.lookup(x).to(dtype)  # (..., width)
            padding = getattr(target, "padding_idx", None)
            if isinstance(op, Hadamard) and padding is not None:  # such a row is used and not trained
                rows = torch.where((x == padding)[..., None], rows.detach(), rows)
            table = shallow_copy(target, padding_idx=None)
            return self.scaled_like(table, state, rows, x)
        return self.look_up(target, state, op.dense().T.to(dtype), x)

    def look_up(self, target: nn.Module, state: AdaptedState, table: Tensor, ids: Tensor) -> Tensor:
        """The layer's own forward on another table (vocabulary, n), so that a scale in it applies here too."""
        double = shallow_copy(target, max_norm=None)
        double._parameters["weight"] = table  # type: ignore[assignment]
        y: Tensor = state.call(double, ids)
        return y

    def scaled_like(self, target: nn.Module, state: AdaptedState, rows: Tensor, ids: Tensor) -> Tensor:
        """Rows already looked up (..., n), passed through the layer's forward as a table of their own."""
        n = rows.shape[-1]
        own = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return self.look_up(target, state, rows.reshape(-1, n), own)


def summed(y: Tensor) -> Tensor:
    """A lookup in a table that processes split by its rows, as the sum of what each has found."""
    if not is_distributed(y):
        return y
    from torch.distributed.tensor import Replicate

    made: Tensor = y.redistribute(placements=[Replicate()] * y.device_mesh.ndim)
    return made
