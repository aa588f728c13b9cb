"""transformers' gradient checkpointing: a block that is computed again in the backward sees the adapters of its forward.

By then the call for which they were chosen is over, and on a GPU the backward runs in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .router import Router

ATTRIBUTE = "_gradient_checkpointing_func"  # on transformers' modules; their blocks call it with what to checkpoint


class Recalling:
    """A checkpointing function after which the choices of the first run hold in the second."""

    def __init__(self, function: Callable[..., Any], router: Router) -> None:
        self.function, self.router = function, router

    def __call__(self, run: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        local = self.router.local
        held = {"chosen": local.chosen, "rows": local.rows, "tasks": local.tasks}

        def again(*args: object, **kwargs: object) -> Any:
            with self.router.hold(**held):
                return run(*args, **kwargs)

        return self.function(again, *args, **kwargs)


def recall_state(root: nn.Module, router: Router) -> None:
    """Let the blocks of `root` that are checkpointed recall what was chosen for one call or thread."""
    for module in root.modules():
        function = module.__dict__.get(ATTRIBUTE)
        if function is not None and not (isinstance(function, Recalling) and function.router is router):
            module.__dict__[ATTRIBUTE] = Recalling(function, router)


def find_carrier(root: nn.Module) -> Any:
    """The first module that says whether transformers checkpoints it, or None."""
    return next((m for m in root.modules() if "gradient_checkpointing" in m.__dict__), None)


def enter_block(root: object, block: object) -> None:
    """Let the input of the blocks need a gradient where checkpointing is reentrant: it passes none on without."""
    # transformers leaves an empty list where somebody turned it off, whose word counts.
    if "_require_grads_hooks" in root.__dict__ or not hasattr(root, "enable_input_require_grads"):
        return
    function = block.__dict__.get(ATTRIBUTE)
    function = getattr(function, "function", function)  # within what recalls adapters
    if getattr(function, "keywords", {}).get("use_reentrant", True):
        root.enable_input_require_grads()
