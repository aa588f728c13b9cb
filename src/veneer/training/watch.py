"""A look at the first two steps of training, for what would make it pointless in silence; then it is gone.

    with veneer.watch(model, optimizer):
        ...  # the loop as it is

Hooks are on the model as a whole, on the optimizer and on trained parameters; no module has one, so that kernels serve
the watched steps as any other, and the numbers are the same. Where something looks wrong, the forward is run again under
`replay` to say where. After the second step of the optimizer nothing of this is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends import backends
from ..distributed.sharding import distributed, is_partitioned, is_sharded, rank
from ..injection.entries import copy_name
from ..injection.router import adapter_names
from ..lifecycle.adapters import Runtime, runtime_of
from ..lifecycle.attach import attach_adapter
from ..lifecycle.keys import HALF
from ..lifecycle.load_report import LoadReport
from ..methods.base import Method
from .findings import Finding, WatchError, WatchWarning
from .optimizers import by_deepspeed, innermost
from .replay import Call, Seen, floats, rerun_forward
from .steps import drive_steps

STEPS = 2  # of the optimizer that are looked at
NAMED = 3  # parameters that a message names
SAMPLED = 16  # entries of each frozen weight that are compared
SKIPPED = 3  # steps in a row that a GradScaler may leave out until its scale fits
IGNORED = -100  # the label that losses leave out
ADVICE = "build the optimizer after the last get_peft_model, add_adapter or load_adapter"


@dataclass(eq=False)
class Trained:
    """A trained parameter, and whose it is."""

    name: str
    parameter: nn.Parameter
    adapter: str | None = None  # None for one that is no adapter's
    layer: nn.Module | None = None  # whose forward uses it; None where that is not known
    site: str = ""
    lookup: bool = False  # only rows of what comes in get a gradient

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of it, and no hook on it says what happens."""
        return is_sharded(self.parameter)

    @property
    def taken(self) -> bool:
        """Whether its gradient and its updates are elsewhere than with it."""
        return self.sharded or by_deepspeed(self.parameter)


def watch(model: nn.Module, optimizer: Any = None, *, action: str = "raise") -> Watch:
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


class Watch:
    """See `watch`. `findings` are what was found so far; `close` ends it."""

    def __init__(
        self, model: nn.Module, optimizer: Any = None, *, action: str = "raise", compiled: bool = False
    ) -> None:
        if action not in ("raise", "warn"):
            raise ValueError(f"action={action!r}: must be 'raise' or 'warn'")
        self.model, self.action = bare(model), action
        given = optimizer if isinstance(optimizer, (list, tuple)) else () if optimizer is None else (optimizer,)
        self.optimizers = [o for o in map(innermost, given) if hasattr(o, "register_step_pre_hook")]
        self.findings: list[Finding] = []
        self.roots = [m for m in self.model.modules() if runtime_of(m) is not None] or [self.model]
        self.handles: list[Any] = []  # of what stays until the end
        self.passing: list[Any] = []  # on layers, for one forward
        self.sample: list[tuple[str, Tensor, Tensor, Tensor]] | None = None  # name, tensor, where, values
        self.steps, self.discarded = 0, 0
        self.closed = self.trains = self.queued = self.hooked = False
        self.never: dict[str, set[int]] = {}  # kind -> parameters it holds for in every step so far
        self.moved: set[int] = set()
        self.marked: dict[int, Any] = {}  # hooks on parameters whose gradient is looked for
        self.ends: list[Any] = []  # hooks on outputs
        self.begin()
        # A hook inside compiled code would become a part of it; around it there is room where it is a module.
        self.seen: dict[nn.Module, nn.Module] = {}  # what has the hooks -> what runs
        if "_orig_mod" in model._modules:
            self.seen = {model: model.get_submodule("_orig_mod")}
        if not self.seen and not compiled:
            self.seen = {r: r for r in self.roots if r.__dict__.get("_compiled_call_impl") is None}
        for root in self.roots:
            for other in watches(root):
                other.close()
        for module in self.seen:
            self.handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.after, with_kwargs=True))
        for one in self.optimizers:
            self.handles.append(one.register_step_pre_hook(self.stepping))
            self.handles.append(one.register_step_post_hook(self.stepped))

    def begin(self) -> None:
        """Forget what was seen of one step."""
        for handle in (*self.marked.values(), *self.ends):
            handle.remove()
        self.call: Call | None = None
        self.used: set[tuple[int, str]] = set()  # runtime and adapter that forwards of this step applied
        self.off: list[Finding] = []  # forwards with adapters disabled
        self.trained: list[Trained] = []
        self.marked, self.ends = {}, []
        self.arrived: list[tuple[int, Tensor]] = []  # parameters in the order of the backward, and whether finite
        self.nonzero: list[Tensor] = []  # whether they are more than zeros
        self.outer: list[Tensor] = []  # whether the gradients that the model's outputs get are finite
        self.labels: list[bool] = []  # of each batch, whether all are ignored
        self.losses: list[Tensor] = []
        self.backwards, self.overflow, self.closure = 0, False, False
        self.done: set[int] = set()  # optimizers that have stepped
        self.before_step: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None

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

    # What people do with it.

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
            self.report([self.unstepped(fatal=False)])
        self.close()

    def close(self) -> None:
        """Remove all hooks."""
        self.closed, self.trains = True, False
        self.let_go()
        self.begin()
        self.handles = [h for h in self.handles if not removed(h, running=self.hooked)]
        self.sample, self.optimizers = None, []

    # What is seen.

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.let_go()
        self.trains = self.queued = False
        if torch.compiler.is_compiling():
            return
        if distributed() and any(is_sharded(p) for p in module.parameters()):
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
        runtime = runtime_of(bare(within))
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
        self.trained = survey(self.model)
        for runtime in runtimes:
            rows = runtime.router.rows()
            names = list(adapter_names(runtime.router.live())) if rows is None else list(rows.distinct)
            while names:
                name = names.pop()
                self.used.add((id(runtime), name))
                names += runtime.configs[name].uses if name in runtime.configs else ()
        if self.sample is None:
            self.sample = [s for root in self.roots for s in samples(root)]
            self.report(self.look_at_parameters())

    def gathered(self, name: str, owner: nn.Module, module: nn.Module, args: Any) -> None:
        for backend in backends():
            try:
                backend.gathered(owner, "weight")
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from None

    def arrives(self, key: int, gradient: Tensor) -> None:
        values = (gradient.coalesce().values() if gradient.is_sparse else gradient).detach()
        self.arrived.append((key, values.isfinite().all()))
        self.nonzero.append(values.any())

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.trains or self.call is None or self.seen[module] is not self.call.root:
            return
        tensors = list(floats(output))
        loss = output.get("loss") if hasattr(output, "get") else tensors[0] if tensors and not tensors[0].ndim else None
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach())
        self.look_at_output(tensors, loss if isinstance(loss, Tensor) else None)
        if self.closed:
            return
        self.look_for_idle(runtime_of(bare(self.seen[module])), any(t.requires_grad for t in tensors), bool(tensors))
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
            found = self.look_for_gradients()
            lacking = [t for t in self.trained if id(t.parameter) in self.never.get("no gradient", ())]
            self.close()
            self.report([*found, *([] if found or not lacking else [unused(lacking)])])
            return
        self.overflow = any(not bool(good) for _, good in self.arrived)

    def stepping(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Before an optimizer's step."""
        self.hooked = True
        try:
            self.look_before_step(optimizer, args, kwargs)
        finally:
            self.hooked = False

    def look_before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or scaled_away(optimizer):
            return
        if not self.seen:  # compiled as a whole: what is there after the backward is all there is to see
            self.look_at_model(r for r in map(runtime_of, self.roots) if r is not None)
            self.backwards = sum(t.parameter.grad is not None for t in self.trained)
        if any(a is not None for a in (*args[1:], *kwargs.values())):  # a closure will compute the gradients
            self.before_step, self.closure = self.before_step or {}, True
        elif self.before_step is None and (self.backwards or self.arrived) and not self.closed:
            self.before_step = {}
            self.report([*self.look_for_gradients(), *self.look_at_gradients()])
            if not self.closed:
                self.before_step = places(self.trained)

    def stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
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
            self.report([*self.look_for_gradients(), *self.look_at_gradients()])
        self.steps += 1
        self.discarded = 0
        if not self.closed:
            self.report([*self.look_at_movement(), *self.look_at_base()])
        if self.closed:
            return
        if self.steps == STEPS:
            self.report(self.verdict())
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
            if finding not in fatal and rank() == 0:
                warnings.warn(str(finding), WatchWarning, stacklevel=3)
        if fatal:
            raise WatchError(fatal)

    # What it means.

    def held(self) -> dict[int, nn.Parameter]:
        """What the optimizers hold."""
        return {id(p): p for o in self.optimizers for group in o.param_groups for p in group["params"]}

    def rates(self) -> dict[int, float]:
        """The learning rate of each parameter that an optimizer holds."""
        groups = [g for o in self.optimizers for g in o.param_groups]
        return {id(p): float(g.get("lr", 1.0)) for g in groups for p in g["params"]}

    def live(self, one: Trained) -> bool:
        """Whether forwards of this step applied whose parameter it is."""
        return one.adapter is None or any(name == one.adapter for _, name in self.used)

    def again(self) -> Seen:
        """The last forward once more; nothing is seen of sharded models, whose processes would have to agree on it."""
        if self.call is None or any(is_sharded(p) for p in self.model.parameters()):
            return Seen()
        runtime = runtime_of(bare(self.call.root))
        return rerun_forward(self.call, None if runtime is None else runtime.router)

    def look_at_parameters(self) -> list[Finding]:
        """Before the first step: dtypes, and what is trained of the base."""
        found = []
        half = [t for t in self.trained if t.parameter.dtype in HALF and not by_deepspeed(t.parameter)]
        if half:
            kind = str(half[0].parameter.dtype).removeprefix("torch.")
            found.append(
                Finding(
                    "dtype",
                    f"{len(half)} of {len(self.trained)} trained parameters are in {kind}: {listed(half)}",
                    "The model was cast after adapters were attached, or they were attached with "
                    f"autocast_adapter_dtype=False; small updates of {kind} numbers are rounded away",
                    "cast the model before get_peft_model, which keeps adapters in float32, or cast them back: "
                    "for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data",
                )
            )
        base = [t for t in self.trained if t.adapter is None and any(inside(root, t.parameter) for root in self.roots)]
        if base and len(base) < len(self.trained):
            found.append(
                Finding(
                    "base",
                    f"{len(base)} weights of the base model are trained beside the adapter: {listed(base)}",
                    "They were unfrozen after the adapter was attached; the adapter's file does not hold them",
                    "freeze them, or name their modules in modules_to_save, which trains a copy that is saved",
                )
            )
        return found

    def look_at_output(self, tensors: list[Tensor], loss: Tensor | None) -> None:
        """Whether loss and outputs of a forward are finite."""
        if loss is not None and bool(loss.isfinite().all()):
            return
        if loss is None and not any(bool(t.isnan().any()) for t in tensors if t.requires_grad):
            return
        if loss is not None and self.labels and self.labels[-1]:
            self.report([no_labels(f"the loss is {float(loss.detach().sum()):g}")])
            return
        what = f"the loss is {float(loss.detach().sum()):g}" if loss is not None else "the model's output has NaN in it"
        seen = self.again()
        first = f"it appears first at the output of {seen.first[0]}" if seen.first else "no module's output shows where"
        cause = seen.first[1] if seen.first else "the loss itself gives it; look at its inputs, and at the labels"
        self.report(
            [
                Finding(
                    "not finite",
                    f"{what} in step {self.steps + 1}: {first}",
                    f"There {cause}" if seen.first else cause.capitalize(),
                    "nothing was updated yet, the weights are as they were",
                    fatal=loss is not None,  # else what is not finite may be left out of the loss
                )
            ]
        )

    def look_for_idle(self, runtime: Runtime | None, needs: bool, tensors: bool) -> None:
        """Whether anything that is trained is at work in a forward."""
        working = [t for t in self.trained if self.live(t)]
        if runtime is None and not self.trained:
            return
        if not working:
            if runtime is not None and self.trained and not runtime.router.enabled:
                self.off.append(self.why_idle(runtime))  # for a moment perhaps, as for the outputs of a reference
                return
            self.report([self.why_idle(runtime)])
        elif tensors and not needs:
            partitioned = [t for t in working if is_partitioned(t.parameter)]
            if len(partitioned) < len(working):
                self.report([cut(working, self.trained, checkpointed(self.model))])

    def why_idle(self, runtime: Runtime | None) -> Finding:
        router = None if runtime is None else runtime.router
        trained = list(dict.fromkeys(t.adapter for t in self.trained if t.adapter))
        active = list(router.active) if router is not None else []
        where = f"active: {named(active)}; trained: {named(trained)}"
        if not self.trained:
            cause = f"All of it is frozen: the adapters {named(active)} were loaded without is_trainable=True, or frozen since"
            remedy = "load with is_trainable=True, or call model.set_requires_grad(name, True)"
        elif router is not None and not router.enabled:
            cause = "Adapters are disabled"
            remedy = "train outside disable_adapter(), or call enable_adapter_layers()"
        elif router is not None and set(trained) & set(adapter_names(router.merged)):
            cause = f"The adapters {named(list(adapter_names(router.merged)))} are merged into the base weights, which are frozen"
            remedy = "call model.unmerge_adapter() before training"
        else:
            cause = "Activating an adapter does not change what is trained, and a loaded one is frozen"
            remedy = (
                f"call model.set_adapter({trained[0] if trained else 'name'!r}), or "
                "model.set_requires_grad(name, True) for the one that is active"
            )
        return Finding(
            "idle", f"nothing that is trained is at work in step {self.steps + 1} ({where})", cause, remedy, True
        )

    def look_for_gradients(self) -> list[Finding]:
        """After the backwards of a step: trained parameters that got no gradient."""
        got = {key for key, _ in self.arrived}
        working = [t for t in self.trained if self.live(t) and not is_partitioned(t.parameter)]
        lacking = [t for t in working if id(t.parameter) not in got and t.parameter.grad is None]
        ran: list[nn.Module] = []
        if lacking:
            ran = self.again().ran
            order = {layer: i for i, layer in enumerate(ran)}
            called = [t for t in working if t.layer in order and not t.sharded]
            first = min((order[t.layer] for t in called if t.layer is not None), default=None)
            starved = [t for t in called if t.layer is not None and order[t.layer] == first]
            lacking = [t for t in lacking if t.layer is None or t.layer in order or t.sharded]
            if len(lacking) == len(working) or (starved and all(t in lacking for t in starved)):
                return [cut(lacking, self.trained, checkpointed(self.model))]
        self.keep("no gradient", lacking)
        return []

    def keep(self, kind: str, found: Iterable[Trained]) -> None:
        """Note what holds for some parameters; only what held in every step is said."""
        now = {id(t.parameter) for t in found}
        self.never[kind] = self.never[kind] & now if kind in self.never else now

    def look_at_gradients(self) -> list[Finding]:
        """Before an optimizer's step: gradients that are not finite or all zero, and the dtypes of gradients."""
        found = []
        whole = [t for t in self.trained if t.parameter.grad is not None and not t.taken]
        sizes = largest([t.parameter.grad for t in whole])  # type: ignore[misc]
        weights = largest([t.parameter for t in whole])
        bad = [t for t, size in zip(whole, sizes, strict=True) if not torch.isfinite(torch.tensor(size))]
        if bad:
            return [self.not_finite(bad)]
        if self.labels and all(self.labels):
            return [no_labels(f"all {len(self.labels)} batches of step {self.steps + 1}")]
        # What multiplies something that starts at zero gets no gradient until that has moved.
        starts = {(t.site, t.adapter) for t, size, w in zip(whole, sizes, weights, strict=True) if not w and size}
        zero = [t for t, size in zip(whole, sizes, strict=True) if not size]
        self.keep("zero gradient", [t for t in zero if not t.lookup and (t.site, t.adapter) not in starts])
        self.keep("all zero", whole if whole and len(zero) == len(whole) else [])
        if self.never["all zero"] and self.steps + 1 == STEPS:
            nothing = bool(self.losses) and all(float(loss.sum()) == 0 for loss in self.losses)
            found.append(
                Finding(
                    "loss",
                    f"every gradient was 0 in both steps, at {listed(whole)}"
                    + (", and so was the loss" if nothing else ""),
                    "The loss is constant: it is multiplied by 0, masked out, or its rewards are all alike"
                    if nothing
                    else "The loss does not depend on what the adapter does, or underflows in half precision",
                    "look at the loss, its weights and masks",
                    fatal=True,
                )
            )
        odd = [t for t in whole if t.parameter.grad.dtype != t.parameter.dtype]  # type: ignore[union-attr]
        if odd:
            kinds = f"{odd[0].parameter.grad.dtype}, where the parameter is {odd[0].parameter.dtype}"  # type: ignore[union-attr]
            found.append(
                Finding(
                    "dtype",
                    f"gradients of {listed(odd)} are {kinds}",
                    "Parameters were cast between backward and step, or grad_dtype was set",
                    "cast the model before training",
                )
            )
        return found

    def not_finite(self, bad: list[Trained]) -> Finding:
        """A gradient that is not finite where the loss is."""
        names = {id(t.parameter): t.name for t in self.trained}
        keys = {id(t.parameter) for t in bad}
        at = next((i for i, (key, good) in enumerate(self.arrived) if key in keys and not bool(good)), None)
        if not all(map(bool, self.outer)):
            where, cause = (
                "it comes into the model's output already",
                "The loss computed from the output is not differentiable there",
            )
        elif at is None:
            where, cause = f"at {listed(bad)}", "It arose while gradients were added up or scaled"
        else:
            good = [names[key] for key, fine in self.arrived[:at] if bool(fine) and key in names]
            since = f", after {good[-1]}, whose gradient is finite" if good else ", the first that the backward reached"
            where = f"first at {names.get(self.arrived[at][0], bad[0].name)}{since}"
            cause = "The backward of that layer, or of what lies between, divides by 0 or overflows (a root or norm at 0, float16)"
        return Finding(
            "not finite",
            f"{len(bad)} of {len(self.trained)} gradients are NaN or Inf in step {self.steps + 1} though the loss is finite; "
            f"in the order of the backward {where}",
            cause,
            "nothing was updated yet; add an epsilon there, or use bfloat16 or float32",
            fatal=True,
        )

    def look_at_movement(self) -> list[Finding]:
        """After a step: what moved, what the optimizers hold, and in which dtype they remember."""
        before = self.before_step or {}
        held, rates = self.held(), self.rates()
        looked = [t for t in self.trained if id(t.parameter) in before]
        if looked:
            now = [torch.take(t.parameter.detach(), before[id(t.parameter)][0]) for t in looked]
            same = [bool(n == before[id(t.parameter)][1]) for t, n in zip(looked, now, strict=True)]
            self.moved |= {id(t.parameter) for t, still in zip(looked, same, strict=True) if not still}
        due = [t for t in looked if float(before[id(t.parameter)][2])]  # their gradient is not zero
        still = [t for t in due if id(t.parameter) not in self.moved]
        waiting = self.steps < STEPS and held and not any(rates.values())  # a warm-up may begin with a rate of 0
        found = []
        mine = {id(p) for p in self.model.parameters()}
        stale = [k for k, p in held.items() if k not in mine and p.requires_grad and p.grad is None]
        stale = [] if any(t.taken for t in self.trained) else stale
        self.never["stale"] = self.never["stale"] & set(stale) if "stale" in self.never else set(stale)
        lacking = [t for t in still if id(t.parameter) not in held]
        if lacking and not waiting:
            every = [t for t in self.trained if id(t.parameter) not in held and self.live(t)]
            none = not any(id(t.parameter) in held for t in self.trained if self.live(t))
            old = f", and holds {len(stale)} parameters that the model does not have" if stale else ""
            self.never["stale"] = set()
            found.append(
                Finding(
                    "optimizer",
                    f"the optimizer lacks {len(every)} of {len(self.trained)} trained parameters{old}: {listed(every)}",
                    "Adapters were attached, attached again or unfrozen after the optimizer was built, or another model's "
                    "parameters were given to it",
                    ADVICE,
                    fatal=none,
                )
            )
        still = [t for t in still if id(t.parameter) in held]
        if still and self.steps == STEPS and not self.moved:
            zero = not any(rates[id(t.parameter)] for t in still)
            half = still[0].parameter.dtype in HALF
            found.append(
                Finding(
                    "still",
                    f"no trained weight moved in {self.steps} steps though there are gradients: {listed(still)}",
                    "The learning rate is 0 after the first step as well"
                    if zero
                    else f"The update is smaller than {still[0].parameter.dtype} can add (learning rate "
                    f"{rates[id(still[0].parameter)]:g})"
                    if half
                    else f"The step of {type(self.optimizers[0]).__name__} changes nothing (learning rate "
                    f"{rates[id(still[0].parameter)]:g})",
                    "look at lr, the scheduler and its warm-up"
                    if zero
                    else "raise the learning rate, or train in float32",
                    fatal=True,
                )
            )
        elif self.steps == STEPS:
            resting = [t for t in still if not rates[id(t.parameter)] or expected(t, before, rates)]
            if resting:
                rate = rates[id(resting[0].parameter)]
                found.append(
                    Finding(
                        "still",
                        f"{len(resting)} of {len(self.trained)} trained weights did not move though they have gradients: "
                        f"{listed(resting)}",
                        f"Their parameter group has a learning rate of {rate:g}, or the optimizer leaves them out",
                        "look at the optimizer's parameter groups",
                    )
                )
        return [*found, *self.look_at_state()]

    def look_at_state(self) -> list[Finding]:
        """The dtype of what optimizers remember."""
        for optimizer in self.optimizers:
            for one in self.trained:
                state = optimizer.state.get(one.parameter, {}) if one.parameter.dtype == torch.float32 else {}
                halves = [k for k, v in state.items() if isinstance(v, Tensor) and v.dtype in HALF and v.ndim]
                if halves:
                    return [
                        Finding(
                            "dtype",
                            f"the optimizer's {halves[0]} of {one.name} is {state[halves[0]].dtype} for a float32 parameter",
                            "The parameter was cast after the optimizer was built, or its state was loaded from a run in "
                            "half precision",
                            "cast the model before the optimizer is built",
                        )
                    ]
        return []

    def look_at_base(self) -> list[Finding]:
        """Frozen weights and statistics that are no longer what they were."""
        moved = []
        for name, tensor, where, values in self.sample or ():
            now = torch.take(tensor.detach(), where)
            if not bool(((now == values) | (now.isnan() & values.isnan())).all()):
                moved.append((name, isinstance(tensor, nn.Parameter)))
        weights, statistics = [n for n, w in moved if w], [n for n, w in moved if not w]
        self.sample = [s for s in self.sample or () if s[0] not in {n for n, _ in moved}]
        found = []
        if weights:
            found.append(
                Finding(
                    "base",
                    f"{len(weights)} frozen weights of the base model moved in step {self.steps}: {shown(weights)}",
                    "The optimizer was given them with gradients from before they were frozen, or code writes to them",
                    "give the optimizer only what is trained: [p for p in model.parameters() if p.requires_grad]; the adapter "
                    "is of no use without the changed base",
                )
            )
        if statistics:
            found.append(
                Finding(
                    "statistics",
                    f"running statistics of frozen batch norms move: {shown(statistics)}",
                    "A model in train mode updates them, and the adapter's file does not hold them",
                    "call .eval() on these layers after model.train()",
                )
            )
        return found

    def verdict(self) -> list[Finding]:
        """After the last step: what was so in each."""
        by_key = {id(t.parameter): t for t in self.trained}
        found = []
        lacking = [by_key[k] for k in self.never.get("no gradient", ()) if k in by_key]
        if lacking:
            found.append(unused(in_order(lacking, self.trained)))
        zero = [by_key[k] for k in self.never.get("zero gradient", ()) if k in by_key]
        if zero and not any(f.kind == "loss" for f in self.findings):
            found.append(
                Finding(
                    "zero gradient",
                    f"the gradient of {len(zero)} of {len(self.trained)} trained parameters was 0 in both steps: "
                    f"{listed(in_order(zero, self.trained))}",
                    "What these layers return is multiplied by 0 or masked later on, or both factors of an adapter are 0",
                    "look at the layers behind them and at the adapter's start, or leave them out of target_modules",
                )
            )
        if stale := self.never.get("stale"):
            found.append(
                Finding(
                    "stale",
                    f"the optimizer holds {len(stale)} parameters that the model does not have and that get no gradient",
                    "They are of an adapter that was deleted or attached again after the optimizer was built",
                    ADVICE,
                )
            )
        idle = [t for t in self.trained if not self.live(t)]
        if idle:
            names = named(list(dict.fromkeys(str(t.adapter) for t in idle)))
            found.append(
                Finding(
                    "idle",
                    f"adapters {names} are trained and were not at work: {listed(idle)}",
                    "They are not active, or merged",
                    f"activate them with set_adapter, or freeze them with model.set_requires_grad({names}, False)",
                )
            )
        return found

    def look_for_gradients_lost(self) -> None:
        """Whether gradients went away since the last backward, with no step of the optimizer."""
        if not self.optimizers or self.before_step is not None:
            return
        here = [t.parameter.grad for t in self.trained if not t.taken]
        if not here or any(largest([g for g in here if g is not None])) or not any(map(bool, self.nonzero)):
            return
        self.discarded += 1
        overflow = self.overflow
        if self.discarded >= (SKIPPED if overflow else STEPS):
            self.report([self.unstepped(fatal=not overflow)])
            self.discarded = 0
        if not self.closed:
            self.backwards, self.overflow, self.arrived, self.nonzero = 0, False, [], []

    def unstepped(self, *, fatal: bool) -> Finding:
        kind = type(self.optimizers[0]).__name__
        if self.overflow:
            return Finding(
                "still",
                f"gradients were NaN or Inf and {kind} made no step, {max(self.discarded, 1)} times in a row",
                "A GradScaler leaves out steps whose gradients overflow; a few at the start are normal, more are not",
                "lower its init_scale, or train in bfloat16 or float32",
            )
        return Finding(
            "still",
            f"there were gradients, and the watched {kind} made no step with them",
            "zero_grad() comes between backward and step, or another optimizer makes the steps",
            "call backward, step and zero_grad in this order, on the optimizer that holds the adapter",
            fatal,
        )


def bare(model: nn.Module) -> nn.Module:
    """The model within a facade or a wrapper."""
    while True:
        inner = model.__dict__.get("_modules", {})
        if "_orig_mod" in inner or type(model).__name__ in (
            "DistributedDataParallel",
            "DataParallel",
            "DeepSpeedEngine",
        ):
            model = inner["_orig_mod"] if "_orig_mod" in inner else inner["module"]
        elif "_runtime" in model.__dict__:
            model = model.__dict__["_runtime"].root
        else:
            return model


def removed(handle: Any, *, running: bool) -> bool:
    """Take a hook away, and say whether it is gone.

    An optimizer goes through its hooks as they are stored, so while it does one that others come after is only emptied.
    """
    hooks = handle.hooks_dict_ref()
    if running and hooks is not None and handle.id in hooks and next(reversed(hooks)) != handle.id:
        hooks[handle.id] = nothing
        return False
    handle.remove()
    return True


def nothing(*args: Any) -> None:
    """What is left of a hook."""


def watches(root: nn.Module) -> list[Watch]:
    """Those that look at a model now."""
    found = [getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values()]
    return [w for w in found if isinstance(w, Watch)]


def look_once(root: nn.Module) -> None:
    """Look at the next backward of `root`, if nobody does yet."""
    if not watches(root):
        Watch(root)


def attach_watched(
    runtime: Runtime, adapter: str, config: Method, *, trainable: bool = True, **options: Any
) -> LoadReport:
    """Attach an adapter and let its training hooks act; on a quantized base its first backward is checked.

    Arguments and errors are those of `attach_adapter`.
    """
    report = attach_adapter(runtime, adapter, config, trainable=trainable, **options)
    drive_steps(runtime, adapter)
    if trainable and any(site.backend is not None and site.backend.packed for site in runtime.places[adapter]):
        look_once(runtime.root)
    return report


def survey(model: nn.Module) -> list[Trained]:
    """What is trained, in the model's order."""
    whose: dict[int, tuple[str, nn.Module | None, str, bool]] = {}
    for root in model.modules():
        runtime = runtime_of(root)
        if runtime is None:
            continue
        for adapter, sites in runtime.places.items():
            for site in sites:
                layer = runtime.layers[site.name]
                if site.kind.whole:
                    copied = layer._modules[copy_name(adapter)]
                    parts = [] if copied is None else list(copied.parameters())
                else:
                    parts = [site.owner._parameters[a] for _, a in site.entries[adapter].trained]  # type: ignore[misc]
                lookup = isinstance(layer, nn.Embedding) or site.lookup
                for part in parts:
                    whose.setdefault(id(part), (adapter, layer, site.name, lookup))
            for part in runtime.router.shared.trained(adapter):
                whose[id(part)] = (adapter, None, "", False)
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.append(Trained(name, parameter, *whose.get(id(parameter), ())))
    return found


def inside(root: nn.Module, parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in root.parameters())


def samples(root: nn.Module) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Some entries of each frozen weight of a base model, and of the statistics of its frozen batch norms."""
    found: list[tuple[str, Tensor]] = []
    for name, p in root.named_parameters():
        plain = type(p) is nn.Parameter and type(p.data) is Tensor and not is_sharded(p) and not by_deepspeed(p)
        if plain and ":" not in name and not p.requires_grad and p.device.type != "meta" and p.numel():
            found.append((name, p))
    for name, module in root.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and ":" not in name:
            if not any(p.requires_grad for p in module.parameters()):
                found.append((f"{name}.running_mean", module.running_mean))
    taken = []
    for name, tensor in found:
        where = spread(tensor.numel(), tensor.device)
        taken.append((name, tensor, where, torch.take(tensor.detach(), where)))
    return taken


def spread(size: int, device: torch.device | None = None) -> Tensor:
    """Positions of some entries from the first to the last of `size`, in whole numbers: float32 cannot count so far."""
    count = min(SAMPLED, size)
    return torch.arange(count, device=device) * (size - 1) // max(count - 1, 1)


def places(trained: Iterable[Trained]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Of each parameter with a gradient: where that is largest, the value and the gradient there."""
    found = {}
    for one in trained:
        p, gradient = one.parameter, one.parameter.grad
        if gradient is None or one.taken or not p.numel():
            continue
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        where = gradient.detach().abs().argmax()
        found[id(p)] = where, torch.take(p.detach(), where), torch.take(gradient.detach(), where)
    return found


def largest(tensors: Sequence[Tensor]) -> list[float]:
    """The largest magnitude in each tensor; NaN where there is one."""
    dense = [t.detach().coalesce().values() if t.is_sparse else t.detach() for t in tensors]
    found = [t.abs().max().float() if t.numel() else torch.zeros(()) for t in dense]
    return [float(v) for v in found]


def expected(one: Trained, before: dict[int, tuple[Tensor, Tensor, Tensor]], rates: dict[int, float]) -> bool:
    """Whether a step should have moved a float32 parameter by more than its precision."""
    _, value, gradient = before[id(one.parameter)]
    step = rates[id(one.parameter)] * min(abs(float(gradient)), 1.0)
    return one.parameter.dtype == torch.float32 and step > 8 * torch.finfo(torch.float32).eps * abs(float(value)) > 0


def scaled_away(optimizer: Any) -> bool:
    """Whether a GradScaler has a fused optimizer leave this step out."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)


def checkpointed(model: nn.Module) -> bool:
    return any(m.__dict__.get("gradient_checkpointing") is True for m in model.modules())


def in_order(some: Iterable[Trained], every: Sequence[Trained]) -> list[Trained]:
    keys = {id(t.parameter) for t in some}
    return [t for t in every if id(t.parameter) in keys]


def cut(lacking: Sequence[Trained], every: Sequence[Trained], checkpoints: bool) -> Finding:
    where = f"{len(lacking)} of {len(every)} trained parameters in the first training step: {listed(lacking)}"
    cause = "Gradient checkpointing cuts the graph where the input of a block needs no gradient, or the model detaches"
    if not checkpoints:
        cause = "The model, or the loss, detaches"
    return Finding(
        "cut",
        f"no gradient reaches {where}",
        f"{cause} what these layers return",
        "call prepare_model_for_kbit_training(model) or model.enable_input_require_grads(), and use "
        'gradient_checkpointing_kwargs={"use_reentrant": False}'
        if checkpoints
        else "look for detach(), no_grad(), .data and argmax behind the first of them",
        fatal=True,
    )


def unused(lacking: Sequence[Trained]) -> Finding:
    return Finding(
        "no gradient",
        f"no gradient reached {listed(lacking)} in the first training step",
        "The loss may not depend on what these layers return, and then they learn nothing",
        "leave them out of target_modules",
    )


def no_labels(what: str) -> Finding:
    return Finding(
        "labels",
        f"all labels are {IGNORED}: {what}",
        "Prompts fill max_length and cut their completions off, or a collator masks everything",
        "raise max_length, or look at the labels of a batch",
        fatal=True,
    )


def named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def listed(some: Sequence[Trained]) -> str:
    return shown([t.name for t in some])


def shown(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
