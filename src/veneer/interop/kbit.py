"""Training on quantized and on checkpointed base models: what they need, and a look at whether gradients arrive."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backends import backends, linear_of, settle
from .checkpointing import ATTRIBUTE

HALF = (torch.float16, torch.bfloat16)
REMEDY = (
    "gradients are cut off between this layer and the loss: call veneer.prepare_model_for_kbit_training(model), before or "
    "after attaching; if checkpointing is your own, use use_reentrant=False or model.enable_input_require_grads(); see "
    "that nothing runs under torch.no_grad(), and that the quantized layers in use have a backward"
)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Freeze a quantized base model, keep what is not quantized in float32, and turn on gradient checkpointing.

    It can be called before or after adapters are attached, which it leaves as they are.

    Args:
        model: a transformers model, or a PeftModel around one.
        use_gradient_checkpointing: whether to turn it on; only done where the model is quantized.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`, such as use_reentrant.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: the model is quantized, and cannot be checkpointed.
    """
    quantized = False
    for path, module in model.named_modules():
        if ":" in path or path.rpartition(".")[2] == "veneer_shared":
            continue
        packed = is_packed(module)
        quantized |= packed
        for name, parameter in module._parameters.items():
            if parameter is None or ":" in name:
                continue
            parameter.requires_grad_(False)
            # A quantized layer casts what else it holds itself; some weights only look like half precision.
            if not packed and parameter.dtype in HALF and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.float()
    settle(model)
    if quantized and use_gradient_checkpointing:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(base, "gradient_checkpointing_enable"):
            raise ValueError(
                f"{type(base).__name__} has no gradient_checkpointing_enable; pass use_gradient_checkpointing=False"
            )
        options = dict(gradient_checkpointing_kwargs or {})
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable(options)
        ready_for_blocks(base, carrier(base))
    return model


def is_packed(module: nn.Module) -> bool:
    """Whether a module's own weight is stored in a packed format."""
    if linear_of(module) is not None:
        return True
    names = [n for n in module._parameters if ":" not in n]
    return any(b.packed and b.matches(module, name) for b in backends() for name in names)


def carrier(root: nn.Module) -> Any:
    """The first module that says whether transformers checkpoints it."""
    return next((m for m in root.modules() if "gradient_checkpointing" in m.__dict__), None)


def ready_for_blocks(root: Any, block: Any) -> None:
    """Give blocks that are checkpointed in the reentrant way an input that needs a gradient: else they pass none."""
    if block is None or not block.gradient_checkpointing or root.__dict__.get("_require_grads_hooks"):
        return
    function = block.__dict__.get(ATTRIBUTE)
    function = getattr(function, "function", function)  # within what recalls adapters
    if getattr(function, "keywords", {}).get("use_reentrant", True) and hasattr(root, "enable_input_require_grads"):
        root.enable_input_require_grads()


class Training:
    """What a model sees to in each forward that is to be trained, and a look at the first backward.

    A cut in the gradient starves the layer that ran first, so that one is looked at: those that did not run, or whose
    output the loss does not use, may well have none.
    """

    def __init__(self) -> None:
        self.block: Any = None
        self.known = self.done = False
        self.handles: list[RemovableHandle] = []
        self.ran: dict[str, tuple[str, ...]] = {}  # module -> its trained parameters, in the order of the calls
        self.reached: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Training:
        return Training()

    def __reduce__(self) -> Any:
        return Training, ()

    def before(self, root: nn.Module) -> None:
        if not self.known:
            self.block, self.known = carrier(root), True
        if self.block is not None and self.block.gradient_checkpointing:
            ready_for_blocks(root, self.block)

    def watch(self, root: nn.Module, live: Collection[str]) -> None:
        """Note which layers run, and which parameters a gradient reaches."""
        if self.handles:
            return
        checkpointed = self.block is not None and bool(self.block.gradient_checkpointing)
        if not checkpointed and not any(is_packed(m) for m in root.modules()):
            self.done = True
            return
        for path, module in root.named_modules():
            names = []
            for name, parameter in module._parameters.items():
                full = f"{path}.{name}" if path else name
                if parameter is not None and parameter.requires_grad and adapter_in(full) in live:
                    names.append(full)
                    self.handles.append(parameter.register_hook(lambda g, full=full: self.reached.add(full)))
            if names:
                own = tuple(names)
                self.handles.append(
                    module.register_forward_pre_hook(lambda m, a, path=path, own=own: self.entered(path, own))
                )

    def entered(self, path: str, names: tuple[str, ...]) -> None:
        self.ran.setdefault(path, names)

    def after(self, outputs: Any) -> None:
        """Have the gradients looked at once the backward from these outputs is over.

        Raises:
            RuntimeError: there is no gradient to come.
        """
        if self.done or not self.ran:
            return
        found = list(tensors_in(outputs))
        if not any(t.requires_grad for t in found):
            self.complain(next(iter(self.ran.values())))
        for t in found:
            if t.requires_grad:
                self.handles.append(t.register_hook(self.started))  # type: ignore[no-untyped-call]

    def started(self, gradient: Tensor) -> None:
        if not self.done:
            self.done = True
            torch.autograd.Variable._execution_engine.queue_callback(self.look)

    def look(self) -> None:
        first = next(iter(self.ran.values()))
        lacking = [n for names in self.ran.values() for n in names if n not in self.reached]
        starved = not any(n in self.reached for n in first)
        self.release()
        if starved:
            self.complain(first, len(lacking))

    def complain(self, names: tuple[str, ...], count: int | None = None) -> None:
        self.release()
        if count is None:
            what = "the model's outputs depend on no trained parameter"
        else:
            what = f"after the first backward, {count} trained parameters have none"
        raise RuntimeError(f"{names[0]} is trained and gets no gradient ({what}); {REMEDY}")

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.ran, self.done = [], {}, True


def adapter_in(name: str) -> str:
    """The adapter that a parameter's full name tells of, or ""."""
    return name.rpartition(":")[2].partition(".")[0] if ":" in name else ""


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in a model's outputs, not those deep inside."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    for value in (outputs,) if isinstance(outputs, Tensor) else values if hasattr(values, "__iter__") else ():
        if isinstance(value, Tensor):
            yield value
