"""A look at the first two steps of training, for what would make it pointless in silence; then it is gone.

    with veneer.watch(model, optimizer):
        ...  # the loop as it is

Hooks are on the model as a whole, on the optimizer and on trained parameters; no module has one, so that kernels serve
the watched steps as any other, and the numbers are the same. Where something looks wrong, the forward is run again under
`replay` to say where. After the second step of the optimizer nothing of this is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import all_backends
from ..distributed.sharding import is_initialized, is_sharded, process_rank
from ..injection.router import adapter_names
from ..lifecycle.adapters import Runtime, runtime_of
from .findings import Finding, WatchError, WatchWarning
from .optimizers import innermost_optimizer
from .record import Record
from .replay import Call, floating_tensors
from .trained import find_largest, list_trained, sample_frozen, sample_updates, unwrap_model
from .watch_checks import (
    IGNORED,
    STEPS,
    check_active,
    check_frozen,
    check_gradients,
    check_gradients_arrived,
    check_movement,
    check_output,
    check_parameters,
    conclude,
    find_unstepped,
    find_unused,
)

SKIPPED = 3  # steps in a row that a GradScaler may leave out until its scale fits


def watch(model: nn.Module, optimizer: object = None, *, action: str = "raise") -> Watch:
    """Look at the first two steps of training.

    Finds trained parameters without a gradient or with one of zeros; an optimizer that lacks trained parameters or holds
    those of adapters that are gone; weights that do not move, and frozen ones that do; NaN and Inf, with the first place
    they appear at; adapter parameters in half precision; adapters that are trained and not active; batches without
    labels. Each is said once with its likely cause and the remedy.

    Args:
        model: a `PeftModel`, its base model, or a module with such in it.
        optimizer: the one that trains it, or several. None looks at the first backward only.
        action: "raise" raises for what makes training pointless and warns of the rest, "warn" only warns.

    Returns:
        What looks; a context manager, though it also goes by itself after the second step.

    Raises:
        ValueError: an unknown `action`.
        WatchError: later, from the model's forward, from backward or from the optimizer's step.
    """
    return Watch(model, optimizer, action=action)


class Watch(Record):
    """See `watch`. `findings` are what was found so far; `close` ends it."""

    def __init__(
        self, model: nn.Module, optimizer: Any = None, *, action: str = "raise", compiled: bool = False
    ) -> None:
        if action not in ("raise", "warn"):
            raise ValueError(f"action={action!r}: must be 'raise' or 'warn'")
        given = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
        super().__init__(model, [o for o in map(innermost_optimizer, given) if hasattr(o, "register_step_pre_hook")])
        self.action = action
        self.handles: list[Any] = []  # of what stays until the end
        self.passing: list[Any] = []  # on layers, for one forward
        self.closed = self.trains = self.queued = self.hooked = False
        # A hook inside compiled code would become a part of it; around it there is room where it is a module.
        self.seen: dict[nn.Module, nn.Module] = {}  # what has the hooks -> what runs
        if "_orig_mod" in model._modules:
            self.seen = {model: model.get_submodule("_orig_mod")}
        if not self.seen and not compiled:
            self.seen = {r: r for r in self.roots if r.__dict__.get("_compiled_call_impl") is None}
        for root in self.roots:
            for other in watches_of(root):
                other.close()
        for module in self.seen:
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after, with_kwargs=True))
        for one in self.optimizers:
            self.handles.append(one.register_step_pre_hook(self.stepping))
            self.handles.append(one.register_step_post_hook(self.stepped))

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model is trained by another optimizer."""
        return {
            **vars(self),
            "optimizers": [],
            "call": None,
            "sample": None,
            "arrived": [],
            "nonzero": [],
            "outer": [],
            "ends": [],
            "marked": {},
            "passing": [],
        }

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        off = self.off[:1]
        if isinstance(error, RuntimeError) and not isinstance(error, WatchError) and off and not self.closed:
            self.close()
            self.findings += off
            raise WatchError(off) from error
        if error is None and not self.closed:
            self.finish()
        self.close()

    def finish(self) -> None:
        """Say what can be said where training ended before the second step."""
        unstepped = (self.backwards or self.arrived) and self.optimizers and not self.steps and not self.done
        if unstepped and not any(f.kind == "still" for f in self.findings):
            self.report([find_unstepped(self, fatal=False)])
        self.close()

    def close(self) -> None:
        """Remove all hooks."""
        self.closed, self.trains = True, False
        self.let_go()
        self.begin()
        self.handles = [h for h in self.handles if not remove_hook(h, running=self.hooked)]
        self.sample, self.optimizers = None, []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.let_go()
        self.trains = self.queued = False
        if torch.compiler.is_compiling():
            return
        if is_initialized() and any(is_sharded(p) for p in module.parameters()):
            for name, owner in module.named_modules():
                if owner._parameters.get("weight") is not None:
                    self.passing.append(owner.register_forward_pre_hook(partial(self.gathered, name, owner)))
        if not (module.training and torch.is_grad_enabled()):
            return
        if self.done:  # not all optimizers step each time
            self.settle()
        elif self.backwards or self.arrived:
            self.look_for_gradients_lost()
        if self.closed:
            return
        within = self.seen[module]
        runtime = runtime_of(unwrap_model(within))
        self.look_at_model([] if runtime is None else [runtime])
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.numel() and not labels.is_floating_point():
            self.labels.append(bool((labels == IGNORED).all()))
        for one in self.trained:
            if id(one.parameter) not in self.marked and not one.sharded:
                hook: Any = one.parameter.register_hook
                self.marked[id(one.parameter)] = hook(partial(self.arrives, id(one.parameter)))
        self.trains = True
        self.call = Call.of(within, args, kwargs, None if runtime is None else runtime.router)

    def look_at_model(self, runtimes: Iterable[Runtime]) -> None:
        """What is trained, and what of that is at work now."""
        self.trained = list_trained(self.model)
        for runtime in runtimes:
            rows = runtime.router.rows()
            names = list(adapter_names(runtime.router.live())) if rows is None else list(rows.distinct)
            while names:
                name = names.pop()
                self.used.add((id(runtime), name))
                names += runtime.configs[name].uses if name in runtime.configs else ()
        if self.sample is None:
            self.sample = [s for root in self.roots for s in sample_frozen(root)]
            self.report(check_parameters(self))

    def gathered(self, name: str, owner: nn.Module, module: nn.Module, args: object) -> None:
        for backend in all_backends():
            try:
                backend.gathered(owner, "weight")
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from None

    def arrives(self, key: int, gradient: Tensor) -> None:
        values = (gradient.coalesce().values() if gradient.is_sparse else gradient).detach()
        self.arrived.append((key, values.isfinite().all()))
        self.nonzero.append(values.any())

    def after(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        if not self.trains or self.call is None or self.seen[module] is not self.call.root:
            return
        tensors = list(floating_tensors(output))
        loss = output.get("loss") if hasattr(output, "get") else tensors[0] if tensors and not tensors[0].ndim else None
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach())
        self.report(check_output(self, tensors, loss if isinstance(loss, Tensor) else None))
        if self.closed:
            return
        runtime = runtime_of(unwrap_model(self.seen[module]))
        self.report(check_active(self, runtime, any(t.requires_grad for t in tensors), bool(tensors)))
        for tensor in tensors if not self.closed else ():  # which of them the loss is computed from is not known
            if tensor.requires_grad:
                hook: Any = tensor.register_hook
                self.ends.append(hook(self.reaches_an_output))

    def reaches_an_output(self, gradient: Tensor) -> None:
        """Have `ended` run when the backward that reached an output is over."""
        if not self.arrived:
            self.outer.append(gradient.detach().isfinite().all())
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.ended)

    def ended(self) -> None:
        """At the end of a backward."""
        self.queued = False
        if self.closed:
            return
        self.backwards += 1
        if not self.optimizers:
            found = check_gradients_arrived(self)
            lacking = [t for t in self.trained if id(t.parameter) in self.never.get("no gradient", ())]
            self.close()
            self.report([*found, *([] if found or not lacking else [find_unused(lacking)])])
            return
        self.overflow = any(not bool(good) for _, good in self.arrived)

    def stepping(self, optimizer: object, args: object, kwargs: object) -> None:
        """Before an optimizer's step."""
        self.hooked = True
        try:
            self.look_before_step(optimizer, args, kwargs)
        finally:
            self.hooked = False

    def look_before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or is_skipped_by_scaler(optimizer):
            return
        if not self.seen:  # compiled as a whole: what is there after the backward is all there is to see
            self.look_at_model(r for r in map(runtime_of, self.roots) if r is not None)
            self.backwards = sum(t.parameter.grad is not None for t in self.trained)
        if any(a is not None for a in (*args[1:], *kwargs.values())):  # a closure will compute the gradients
            self.before_step, self.closure = self.before_step or {}, True
        elif self.before_step is None and (self.backwards or self.arrived) and not self.closed:
            self.before_step = {}
            self.report([*check_gradients_arrived(self), *check_gradients(self)])
            if not self.closed:
                self.before_step = sample_updates(self.trained)

    def stepped(self, optimizer: object, args: object, kwargs: object) -> None:
        """After an optimizer's step."""
        if self.before_step is None or self.closed:
            return
        self.done.add(id(optimizer))
        self.hooked = True
        try:
            if len(self.done) == len(self.optimizers):
                self.settle()
        finally:
            self.hooked = False

    def settle(self) -> None:
        """After a step of all optimizers."""
        if self.closure:
            self.report([*check_gradients_arrived(self), *check_gradients(self)])
        self.steps += 1
        self.discarded = 0
        if not self.closed:
            self.report([*check_movement(self), *check_frozen(self)])
        if self.closed:
            return
        if self.steps == STEPS:
            self.report(conclude(self))
            self.close()
            return
        self.begin()

    def let_go(self) -> None:
        for handle in self.passing:
            handle.remove()
        self.passing = []

    def report(self, found: Iterable[Finding]) -> None:
        """Warn of findings, or raise them where one is fatal."""
        known = {(f.kind, f.cause) for f in self.findings}
        new = [f for f in found if (f.kind, f.cause) not in known]
        self.findings += new
        fatal = [f for f in new if f.fatal and self.action == "raise"]
        if any(f.fatal for f in new):
            self.close()  # what follows would follow from it
        for finding in new:
            if finding not in fatal and process_rank() == 0:
                warnings.warn(str(finding), WatchWarning, stacklevel=3)
        if fatal:
            raise WatchError(fatal)

    def look_for_gradients_lost(self) -> None:
        """Whether gradients went away since the last backward, with no step of the optimizer."""
        if not self.optimizers or self.before_step is not None:
            return
        here = [t.parameter.grad for t in self.trained if not t.taken]
        if not here or any(find_largest([g for g in here if g is not None])) or not any(map(bool, self.nonzero)):
            return
        self.discarded += 1
        overflow = self.overflow
        if self.discarded >= (SKIPPED if overflow else STEPS):
            self.report([find_unstepped(self, fatal=not overflow)])
            self.discarded = 0
        if not self.closed:
            self.backwards, self.overflow, self.arrived, self.nonzero = 0, False, [], []


def remove_hook(handle: Any, *, running: bool) -> bool:
    """Take a hook away, and say whether it is gone.

    An optimizer goes through its hooks as they are stored, so while it does one that others come after is only emptied.
    """
    hooks = handle.hooks_dict_ref()
    if running and hooks is not None and handle.id in hooks and next(reversed(hooks)) != handle.id:
        hooks[handle.id] = _do_nothing
        return False
    handle.remove()
    return True


def _do_nothing(*args: object) -> None:
    """What is left of a hook."""


def watches_of(root: nn.Module) -> list[Watch]:
    """Those that look at a model now."""
    found = [getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values()]
    return [w for w in found if isinstance(w, Watch)]


def watch_next_backward(root: nn.Module) -> None:
    """Look at the next backward of `root`, if nobody does yet."""
    if not watches_of(root):
        Watch(root)


def is_skipped_by_scaler(optimizer: object) -> bool:
    """Whether a GradScaler has a fused optimizer leave this step out."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)
