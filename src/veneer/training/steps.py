"""Lets the training hooks of methods act on an optimizer's steps: `project` and `penalty` before, `constrain` and `step` after.

They act through torch's own hooks on all optimizers, so that no training loop has to call anything. An optimizer is told by
the parameters that it holds. There are none until a model gets an adapter with such a method.

DeepSpeed's ZeRO gives its optimizer flat float32 partitions instead of the parameters, and copies them back after the hooks
ran. `constrain` acts there at the beginning of the next forward, or when the adapter is read; the other hooks cannot act, and
raise at the first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ..distributed import sharding
from ..injection.entries import AdaptedSite
from ..lifecycle.adapters import Runtime
from ..methods.base import Method
from ..methods.hooks import AtSite
from .optimizers import by_deepspeed, read_master, write_master

_drivers: weakref.WeakSet[StepDriver] = weakref.WeakSet()
_handles: list[RemovableHandle] = []


@dataclass(frozen=True)
class Place:
    """An adapter at one site, while it is trained.

    Attributes:
        parameters: what is trained there, by the method's keys.
    """

    adapter: str
    method: Method
    site: AdaptedSite
    parameters: dict[str, nn.Parameter]

    def tensors(self) -> dict[str, Tensor]:
        """The method's tensors with whole values; of sharded ones it is a collective."""
        held = self.site.tensors(self.adapter)
        return {k: sharding.gathered(t.detach()) if sharding.is_distributed(t) else t.detach() for k, t in held.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients of what is trained, of those that have one."""
        return {k: sharding.gathered(p.grad) for k, p in self.parameters.items() if p.grad is not None}


class StepDriver:
    """Calls the training hooks of one model's adapters.

    Attributes:
        asked: adapters whose penalty the loop added to its loss itself since the last step.
        started: serial numbers of the adapters' places that have been constrained for the first time.
        acted: ids of the parameters that an optimizer's step has reached.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.asked: set[str] = set()
        self.started: set[int] = set()
        self.acted: set[int] = set()
        self.pending = False  # ZeRO took a step, and the constraints are still to be applied
        self._changed: dict[
            int, tuple[int, int]
        ] = {}  # parameter -> its gradient as it was left, and that one's version
        self._due: set[str] = set()  # adapters whose step has begun and is not counted yet
        self._seen: dict[int, Tensor] = {}  # a trained tensor of each adapter -> its value at the first backward
        self._handles: list[RemovableHandle] = []
        self._register()

    def __getstate__(self) -> dict[str, Any]:
        return {"runtime": self.runtime}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy of the model
        StepDriver.__init__(self, state["runtime"])

    def _register(self) -> None:
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_step))
            _handles.append(register_optimizer_step_post_hook(_after_step))
        _drivers.add(self)

    def release(self) -> None:
        """End, when the model's adapters are taken off."""
        for handle in self._handles:
            handle.remove()
        _drivers.discard(self)
        if not _drivers:
            while _handles:
                _handles.pop().remove()

    def places(self, *hooks: str) -> Iterator[Place]:
        """Where adapters with one of these hooks are trained; a tensor that several sites use comes once."""
        taken: set[int] = set()
        for adapter, config in self.runtime.configs.items():
            if not set(config.training_hooks) & set(hooks):
                continue
            for site in self.runtime.places[adapter]:
                method = site.entries[adapter].method
                if method.peft_name != config.peft_name:
                    continue  # a companion's
                held = site.parameters(adapter).items()
                own = {k: p for k, p in held if p.requires_grad and id(p) not in taken}
                if own:
                    taken |= {id(p) for p in own.values()}
                    yield Place(adapter, method, site, own)

    def watch_adapter(self, adapter: str) -> None:
        """See that the optimizer's steps reach an adapter that was just attached."""
        first = next((p for p in self.places(*HOOKS) if p.adapter == adapter), None)
        if first is not None:
            parameter = next(iter(first.parameters.values()))
            hook = parameter.register_post_accumulate_grad_hook(self._after_backward)
            self._handles.append(hook)

    def forget_values(self) -> None:
        """Take the parameters' present values as given: a file's were copied into them."""
        self._seen.clear()
        self.started.clear()

    def _after_backward(self, parameter: Tensor) -> None:
        """Raise if a parameter was changed between two backward passes, and no optimizer's hook has run."""
        if id(parameter) in self.acted or by_deepspeed(parameter):
            return
        if id(parameter) not in self._seen:
            self._seen[id(parameter)] = parameter.detach().clone()
        elif not torch.equal(self._seen[id(parameter)], parameter.detach()):
            names = ", ".join(sorted({h for c in self.runtime.configs.values() for h in c.training_hooks}))
            raise RuntimeError(
                f"this adapter's method has training hooks ({names}) that act on the steps of a torch.optim.Optimizer; its "
                "tensors were changed without one. Train it with an optimizer that subclasses torch.optim.Optimizer"
            )

    def before(
        self, owned: set[int], closure: Callable[[], Any] | None, scale: Tensor | None
    ) -> Callable[[], Any] | None:
        """Act before a step of an optimizer that holds `owned`; returns its closure, changed if gradients come from it."""
        if not any(config.training_hooks for config in self.runtime.configs.values()):
            self.release()  # the last such adapter was deleted
            return closure
        # What gets no gradient is not trained in this step, such as an adapter that is not active.
        held = [p for p in self.places(*HOOKS) if _ids(p) & owned and (closure is not None or _has_gradient(p))]
        if not held:
            self._refuse_partitions(owned)
            return closure
        self.acted |= {i for p in held for i in _ids(p)}
        self._due |= {p.adapter for p in held}
        # A file may hold values that no step has constrained, and the gradient is that of the constrained ones.
        fresh = [p for p in held if p.site.entries[p.adapter].serial not in self.started]
        self.started |= {p.site.entries[p.adapter].serial for p in fresh}
        self._constrain(fresh)
        places = [p for p in held if {"project", "penalty"} & set(p.method.training_hooks)]
        if not places:
            return closure
        if closure is None:
            self._change_gradients(places, scale)
            return None

        def changed() -> Any:
            loss = closure()
            total = self._change_gradients([p for p in places if _has_gradient(p)], scale)
            return loss if loss is None else loss + total

        return changed

    def _refuse_partitions(self, owned: set[int]) -> None:
        """Raise if the hooks would act on gradients that ZeRO holds."""
        for place in self.places("project", "penalty", "step"):
            here = [p for p in place.parameters.values() if by_deepspeed(p) and id(p) not in owned]
            hooks = [h for h in place.method.training_hooks if h != "constrain"]
            if here and not (hooks == ["penalty"] and place.adapter in self.asked):
                raise RuntimeError(
                    f"adapter {place.adapter!r} ({place.method.peft_name}): DeepSpeed's ZeRO keeps the gradients to itself, so "
                    f"{', '.join(hooks)} cannot act on them; add veneer.penalty(model) to the loss yourself if it is the "
                    "penalty alone, or train with another engine (DDP, FSDP2)"
                )

    def _change_gradients(self, places: Sequence[Place], scale: Tensor | None) -> float:
        """Add the penalties' gradients and project; returns the penalties."""
        total = 0.0
        for place in places:
            hooks = place.method.training_hooks
            # An optimizer around another one (Lookahead) comes here twice with the same gradients.
            if all(self._changed.get(id(p)) == (id(p.grad), _version(p.grad)) for p in place.parameters.values()):
                continue
            if "penalty" in hooks and place.adapter not in self.asked:
                value, gradients = penalty_at(place)
                total += value
                for key, gradient in gradients.items():
                    own = place.parameters[key]
                    whole = torch.zeros_like(own)
                    sharding.fill_from(whole, gradient if scale is None else gradient * scale.to(gradient))
                    own.grad = whole if own.grad is None else own.grad.add_(whole)
            if "project" in hooks:
                with torch.no_grad():
                    for key, gradient in place.method.project(place.gradients(), place.tensors(), place.site).items():
                        held = place.parameters[key].grad
                        if held is not None:
                            sharding.fill_from(held, gradient)
            self._changed |= {id(p): (id(p.grad), _version(p.grad)) for p in place.parameters.values()}
        return total

    def after(self, owned: set[int]) -> None:
        """Act after a step of an optimizer that holds `owned`."""
        places = [p for p in self.places(*HOOKS) if _ids(p) & owned and _has_gradient(p)]
        if not places:
            if any(by_deepspeed(p) for place in self.places("constrain") for p in place.parameters.values()):
                self._constrain_later()
            return
        self.asked.clear()
        self._changed.clear()  # the next gradients may be other tensors in the same places
        with torch.no_grad():
            for adapter in dict.fromkeys(p.adapter for p in places if "step" in p.method.training_hooks):
                if adapter in self._due:
                    self._step([p for p in places if p.adapter == adapter])
        self._due -= {p.adapter for p in places}
        self._constrain(places)

    def _constrain(self, places: Sequence[Place]) -> None:
        with torch.no_grad():
            for place in places:
                if "constrain" in place.method.training_hooks:
                    for key, value in place.method.constrain(place.tensors(), place.site).items():
                        sharding.fill_from(place.parameters[key], value)

    def _step(self, places: Sequence[Place]) -> None:
        count = self.runtime.steps_of(places[0].adapter)
        count += 1
        whole = [AtSite(p.site, p.tensors(), p.gradients()) for p in places]
        places[0].method.step(int(count), whole)
        for place, at in zip(places, whole, strict=True):
            for key, own in place.site.tensors(place.adapter).items():
                if sharding.is_distributed(own):  # the method changed a gathered copy
                    sharding.fill_from(own, at.tensors[key])

    def _constrain_later(self) -> None:
        self.pending = True
        if not self._handles or self.apply not in self.runtime.on_read:
            self._handles.append(self.runtime.root.register_forward_pre_hook(lambda *_: self.apply()))
            self.runtime.on_read.append(self.apply)

    def apply(self) -> None:
        """Constrain what ZeRO has updated: its float32 partitions, and the parameters made of them. Every process calls it."""
        if not self.pending:
            return
        self.pending = False
        with torch.no_grad():
            for place in self.places("constrain"):
                masters = {k: read_master(p) for k, p in place.parameters.items()}
                held = {k: t.detach() for k, t in place.site.tensors(place.adapter).items() if k not in masters}
                for key, value in place.method.constrain({**held, **masters}, place.site).items():
                    write_master(place.parameters[key], value)
                    sharding.fill_partition(place.parameters[key], value)


HOOKS = ("project", "penalty", "constrain", "step")


def drive_steps(runtime: Runtime, adapter: str) -> None:
    """Let the training hooks of a new adapter's method act."""
    driver = driver_of(runtime)
    if driver is None:
        driver = StepDriver(runtime)
        runtime.on_unload.append(driver.release)
    driver.watch_adapter(adapter)


def driver_of(runtime: Runtime) -> StepDriver | None:
    """What drives the training hooks of a model's adapters."""
    owners: Iterable[object] = (getattr(release, "__self__", None) for release in runtime.on_unload)
    return next((owner for owner in owners if isinstance(owner, StepDriver)), None)


def penalty_at(place: Place) -> tuple[float, dict[str, Tensor]]:
    """A method's penalty at a site, and its gradients, whole."""
    leaves = {k: sharding.gathered(p.detach()).clone().requires_grad_() for k, p in place.parameters.items()}
    with torch.enable_grad():
        value = place.method.penalty({**place.tensors(), **leaves}, place.site)
        if value is None or not value.requires_grad:
            return 0.0, {}
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return float(value), {key: g for key, g in zip(leaves, found, strict=True) if g is not None}


def _ids(place: Place) -> set[int]:
    return {id(p) for p in place.parameters.values()}


def _has_gradient(place: Place) -> bool:
    return any(p.grad is not None for p in place.parameters.values())


def _version(gradient: Tensor | None) -> int:
    """How often a gradient was written."""
    return -1 if gradient is None else gradient._version


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # GradScaler leaves unscaling to optimizers that can do it themselves, and tells them by these attributes.
    scale = vars(optimizer).get("grad_scale")
    given = kwargs.get("closure", args[1] if len(args) > 1 else None)
    closure = given
    for driver in tuple(_drivers):
        closure = driver.before(owned, closure, scale)
    if closure is given:
        return None
    return (args[:1], {**kwargs, "closure": closure})


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    skipped = vars(optimizer).get("found_inf")
    if isinstance(skipped, Tensor) and bool(skipped):
        return
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for driver in tuple(_drivers):
        driver.after(owned)
