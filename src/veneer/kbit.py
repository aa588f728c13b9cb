"""Training on a quantized base: what has to be said to the model before, and a look at the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import layers
from .backends import backends, bare_of, settle
from .runtime import runtime_of

HALF = (torch.float16, torch.bfloat16)
NAMED = 3  # parameters that an error names


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Freeze a base model, keep what is not quantized in float32, and let gradients through its checkpoints.

    On a CPU what is not quantized is also copied out of the file, which is then no longer mapped into memory.

    It can be called before or after adapters are attached, and checkpointing can be turned on before or after it. The
    first training step is then looked at: see `FirstStep`.

    Args:
        model: a transformers model, quantized or not, or a `PeftModel`. Changed in place.
        use_gradient_checkpointing: compute the activations of blocks again in the backward.
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`; {"use_reentrant": False} by default.

    Returns:
        The model.

    Raises:
        ValueError: the model has no gradient checkpointing.
    """
    root: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantized = quantized_layers(root)
    packed = {id(p) for layer in quantized for p in layer._parameters.values()}
    for name, parameter in root.named_parameters():
        if ":" in name:  # an adapter's
            continue
        parameter.requires_grad = False
        if not quantized or id(parameter) in packed or type(parameter) is not nn.Parameter:
            continue
        if parameter.dtype in HALF:
            parameter.data = parameter.data.float()
        elif type(parameter.data) is Tensor and parameter.device.type == "cpu":
            # safetensors maps the file into memory, and one view of it keeps all the pages that quantizing read.
            parameter.data = parameter.data.clone()
    if use_gradient_checkpointing:
        enable = getattr(root, "gradient_checkpointing_enable", None)
        if enable is None or not getattr(root, "supports_gradient_checkpointing", True):
            raise ValueError(
                f"{type(root).__name__} has no gradient checkpointing; pass use_gradient_checkpointing=False"
            )
        enable(gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    # Checkpoints that are reentrant pass no gradient on unless their input has one; a Trainer may turn them on later.
    if hasattr(root, "enable_input_require_grads"):
        root.enable_input_require_grads()
    settle(root)
    FirstStep.watch(root)
    return model


def quantized_layers(root: nn.Module) -> list[nn.Module]:
    """The layers of a model whose weight is stored in another format than plain floating point."""
    found = []
    for module in root.modules():
        kind = layers.kind_of(module)
        mine = kind is not None and any(b.packed and b.matches(module, kind.param) for b in backends())
        if mine or bare_of(module):
            found.append(module)
    return found


class FirstStep:
    """Looks at a model's first training step, and then goes.

    A cut in the graph starves the trained layer that ran first: that raises. Others that ran and got nothing may be ones
    whose output the loss does not use: that warns. Layers that did not run, such as experts without tokens, are let be.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.ran: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {}  # in the order of the calls
        self.reached: set[int] = set()
        self.trained: dict[nn.Module, dict[str, str]] = {}  # names of their own, and in the model
        self.inner: list[Any] = []
        self.outer = [
            root.register_forward_pre_hook(self.before),
            root.register_forward_hook(self.after, always_call=True),
        ]

    @classmethod
    def watch(cls, root: nn.Module) -> None:
        """Look at the next training step of `root`, if nobody does yet."""
        hooks = (*root._forward_pre_hooks.values(), *root._forward_hooks.values())
        if not any(isinstance(getattr(hook, "__self__", None), cls) for hook in hooks):
            cls(root)

    def before(self, module: nn.Module, args: Any) -> None:
        self.release()
        if torch.compiler.is_compiling():
            return
        networks = in_networks(module)
        for name, owner in module.named_modules():
            if owner._parameters.get("weight") is not None:
                # A hook inside a gated network would have its kernel step aside, and keep more than any later step.
                seen = networks.get(owner, owner)
                self.inner.append(seen.register_forward_pre_hook(partial(self.gathered, name, owner)))
        if not (module.training and torch.is_grad_enabled() and runtime_of(module)):
            return
        for name, owner in module.named_modules():
            mine = {n: p for n, p in owner._parameters.items() if p is not None and ":" in n}
            # ZeRO-3 takes gradients away before they are here.
            if mine := {n: f"{name}.{n}" for n, p in mine.items() if p.requires_grad and not hasattr(p, "ds_id")}:
                self.trained[owner] = mine
                seen = networks.get(owner, owner)
                self.inner.append(seen.register_forward_pre_hook(partial(self.called, owner)))

    def gathered(self, name: str, owner: nn.Module, module: nn.Module, args: Any) -> None:
        for backend in backends():
            try:
                backend.gathered(owner, "weight")
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from None

    def called(self, owner: nn.Module, module: nn.Module, args: Any) -> None:
        """Mark what gets a gradient: of sharded parameters those that are here while the layer runs."""
        if owner not in self.ran:
            named = [(name, owner._parameters[n]) for n, name in self.trained[owner].items()]
            self.ran[owner] = [(name, p) for name, p in named if p is not None]
            self.inner += [p.register_hook(self.marks(p)) for _, p in self.ran[owner]]  # type: ignore[no-untyped-call]

    def marks(self, parameter: nn.Parameter) -> Any:
        key = id(parameter)

        def mark(gradient: Tensor) -> None:
            self.reached.add(key)

        return mark

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.trained:
            return
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        tensors = [t for t in values if isinstance(t, Tensor)]
        last = next((t for t in tensors if t.requires_grad), None)
        if last is None:
            if tensors:
                self.complain([name for found in self.trained.values() for name in found.values()])
            return
        self.inner.append(last.register_hook(self.at_the_end))  # type: ignore[no-untyped-call]

    def at_the_end(self, gradient: Tensor) -> None:
        """Have `check` run when the backward that reached the output is over."""
        torch.autograd.Variable._execution_engine.queue_callback(self.check)

    def check(self) -> None:
        """At the end of the first backward."""
        ran = list(self.ran.values())
        lacking = [name for found in ran for name, p in found if id(p) not in self.reached]
        cut = bool(ran) and not any(id(p) in self.reached for _, p in ran[0])
        self.release()
        for hook in self.outer:
            hook.remove()
        if cut:
            self.complain(lacking)
        elif lacking:
            warnings.warn(
                f"no gradient reached {listed(lacking)} in the first training step; the loss may not depend on what these "
                "layers return, and then they learn nothing: leave them out of target_modules",
                stacklevel=2,
            )

    def release(self) -> None:
        for hook in self.inner:
            hook.remove()
        self.inner, self.trained, self.ran, self.reached = [], {}, {}, set()

    def complain(self, lacking: list[str]) -> None:
        total = sum(p.requires_grad for n, p in self.root.named_parameters() if ":" in n)
        self.release()
        raise RuntimeError(
            f"no gradient reaches {len(lacking)} of {total} trained parameters in the first training step: {listed(lacking)}. "
            "Gradient checkpointing cuts the graph where the input of a block needs no gradient, or the model detaches "
            "what these layers return; call prepare_model_for_kbit_training(model) or model.enable_input_require_grads(), "
            'and use gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def in_networks(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """The layers that run whenever a gated feed-forward network does, each with its network.

    Not those that have hooks: their network calls them, and what shards them brings their weights only then.
    """
    found: dict[nn.Module, nn.Module] = {}
    for module in root.modules():
        parts = getattr(module.__dict__.get("_veneer"), "gated", None)
        inside = [module._modules[n] for n in (() if parts is None else (parts.gate, parts.up, parts.down))]
        if not any(layer is None or layer._forward_pre_hooks or layer._forward_hooks for layer in inside):
            found |= {layer: module for layer in inside if layer is not None}
    return found


def listed(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
