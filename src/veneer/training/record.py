"""What the watch has recorded of the steps so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..distributed.sharding import is_sharded
from ..lifecycle.adapters import runtime_of
from .findings import Finding
from .replay import Call, Seen, rerun_forward
from .trained import TrainedParameter, unwrap_model


class Record:
    """What was seen of a model and its optimizers in this step, and what held in every step."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        self.model, self.optimizers = unwrap_model(model), list(optimizers)
        self.roots = [m for m in self.model.modules() if runtime_of(m) is not None] or [self.model]
        self.findings: list[Finding] = []
        self.sample: list[tuple[str, Tensor, Tensor, Tensor]] | None = None  # name, tensor, where, values
        self.steps, self.discarded = 0, 0
        self.never: dict[str, set[int]] = {}  # kind -> parameters it holds for in every step so far
        self.moved: set[int] = set()
        self.marked: dict[int, Any] = {}  # hooks on parameters whose gradient is looked for
        self.ends: list[Any] = []  # hooks on outputs
        self.begin()

    def begin(self) -> None:
        """Forget what was seen of one step."""
        for handle in (*self.marked.values(), *self.ends):
            handle.remove()
        self.call: Call | None = None
        self.used: set[tuple[int, str]] = set()  # runtime and adapter that forwards of this step applied
        self.off: list[Finding] = []  # forwards with adapters disabled
        self.trained: list[TrainedParameter] = []
        self.marked, self.ends = {}, []
        self.arrived: list[tuple[int, Tensor]] = []  # parameters in the order of the backward, and whether finite
        self.nonzero: list[Tensor] = []  # whether they are more than zeros
        self.outer: list[Tensor] = []  # whether the gradients that the model's outputs get are finite
        self.labels: list[bool] = []  # of each batch, whether all are ignored
        self.losses: list[Tensor] = []
        self.backwards, self.overflow, self.closure = 0, False, False
        self.done: set[int] = set()  # optimizers that have stepped
        self.before_step: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def held(self) -> dict[int, nn.Parameter]:
        """What the optimizers hold."""
        return {id(p): p for o in self.optimizers for group in o.param_groups for p in group["params"]}

    def rates(self) -> dict[int, float]:
        """The learning rate of each parameter that an optimizer holds."""
        groups = [g for o in self.optimizers for g in o.param_groups]
        return {id(p): float(g.get("lr", 1.0)) for g in groups for p in g["params"]}

    def live(self, one: TrainedParameter) -> bool:
        """Whether forwards of this step applied whose parameter it is."""
        return one.adapter is None or any(name == one.adapter for _, name in self.used)

    def again(self) -> Seen:
        """The last forward once more; nothing is seen of sharded models, whose processes would have to agree on it."""
        if self.call is None or any(is_sharded(p) for p in self.model.parameters()):
            return Seen()
        runtime = runtime_of(unwrap_model(self.call.root))
        return rerun_forward(self.call, None if runtime is None else runtime.router)

    def keep(self, kind: str, found: Iterable[TrainedParameter]) -> None:
        """Note what holds for some parameters; only what held in every step is said."""
        now = {id(t.parameter) for t in found}
        self.never[kind] = self.never[kind] & now if kind in self.never else now
