"""The checks of the watch: each reads the record of the steps so far and returns what it finds wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..distributed.sharding import is_partitioned
from ..injection.router import adapter_names
from ..lifecycle.adapters import Runtime
from ..lifecycle.keys import HALF
from .findings import Finding
from .optimizers import by_deepspeed
from .record import Record
from .trained import (
    TrainedParameter,
    find_largest,
    is_checkpointed,
    is_inside,
    show_first,
    show_names,
    show_trained,
    sort_like,
)

STEPS = 2  # of the optimizer that are watched
IGNORED = -100  # the label that losses leave out
ADVICE = "build the optimizer after the last get_peft_model, add_adapter or load_adapter"


def check_parameters(record: Record) -> list[Finding]:
    """Before the first step: dtypes, and what is trained of the base."""
    found = []
    half = [t for t in record.trained if t.parameter.dtype in HALF and not by_deepspeed(t.parameter)]
    if half:
        kind = str(half[0].parameter.dtype).removeprefix("torch.")
        found.append(
            Finding(
                "dtype",
                f"{len(half)} of {len(record.trained)} trained parameters are in {kind}: {show_trained(half)}",
                "The model was cast after adapters were attached, or they were attached with "
                f"autocast_adapter_dtype=False; small updates of {kind} numbers are rounded away",
                "cast the model before get_peft_model, which keeps adapters in float32, or cast them back: "
                "for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data",
            )
        )
    base = [
        t for t in record.trained if t.adapter is None and any(is_inside(root, t.parameter) for root in record.roots)
    ]
    if base and len(base) < len(record.trained):
        found.append(
            Finding(
                "base",
                f"{len(base)} weights of the base model are trained beside the adapter: {show_trained(base)}",
                "They were unfrozen after the adapter was attached; the adapter's file does not hold them",
                "freeze them, or name their modules in modules_to_save, which trains a copy that is saved",
            )
        )
    return found


def check_output(record: Record, tensors: list[Tensor], loss: Tensor | None) -> list[Finding]:
    """Whether loss and outputs of a forward are finite."""
    if loss is not None and bool(loss.isfinite().all()):
        return []
    if loss is None and not any(bool(t.isnan().any()) for t in tensors if t.requires_grad):
        return []
    if loss is not None and record.labels and record.labels[-1]:
        return [find_no_labels(f"the loss is {float(loss.detach().sum()):g}")]
    what = f"the loss is {float(loss.detach().sum()):g}" if loss is not None else "the model's output has NaN in it"
    seen = record.again()
    first = f"it appears first at the output of {seen.first[0]}" if seen.first else "no module's output shows where"
    cause = seen.first[1] if seen.first else "the loss itself gives it; look at its inputs, and at the labels"
    return [
        Finding(
            "not finite",
            f"{what} in step {record.steps + 1}: {first}",
            f"There {cause}" if seen.first else cause.capitalize(),
            "nothing was updated yet, the weights are as they were",
            fatal=loss is not None,  # what is not finite in an output may be left out of the loss
        )
    ]


def check_active(record: Record, runtime: Runtime | None, needs: bool, tensors: bool) -> list[Finding]:
    """Whether anything that is trained is at work in a forward whose output `needs` a gradient and has `tensors`."""
    working = [t for t in record.trained if record.live(t)]
    if runtime is None and not record.trained:
        return []
    if not working:
        if runtime is not None and record.trained and not runtime.router.enabled:
            record.off.append(explain_idle(record, runtime))  # for a moment perhaps, as for the outputs of a reference
            return []
        return [explain_idle(record, runtime)]
    if tensors and not needs and not all(is_partitioned(t.parameter) for t in working):
        return [find_cut(working, record.trained, is_checkpointed(record.model))]
    return []


def explain_idle(record: Record, runtime: Runtime | None) -> Finding:
    router = None if runtime is None else runtime.router
    trained = list(dict.fromkeys(t.adapter for t in record.trained if t.adapter))
    active = list(router.active) if router is not None else []
    where = f"active: {show_names(active)}; trained: {show_names(trained)}"
    if not record.trained:
        cause = f"All of it is frozen: the adapters {show_names(active)} were loaded without is_trainable=True, or frozen since"
        remedy = "load with is_trainable=True, or call model.set_requires_grad(name, True)"
    elif router is not None and not router.enabled:
        cause = "Adapters are disabled"
        remedy = "train outside disable_adapter(), or call enable_adapter_layers()"
    elif router is not None and set(trained) & set(adapter_names(router.merged)):
        cause = f"The adapters {show_names(list(adapter_names(router.merged)))} are merged into the base weights, which are frozen"
        remedy = "call model.unmerge_adapter() before training"
    else:
        cause = "Activating an adapter does not change what is trained, and a loaded one is frozen"
        remedy = (
            f"call model.set_adapter({trained[0] if trained else 'name'!r}), or "
            "model.set_requires_grad(name, True) for the one that is active"
        )
    return Finding(
        "idle", f"nothing that is trained is at work in step {record.steps + 1} ({where})", cause, remedy, True
    )


def check_gradients_arrived(record: Record) -> list[Finding]:
    """After the backwards of a step: trained parameters that got no gradient."""
    got = {key for key, _ in record.arrived}
    working = [t for t in record.trained if record.live(t) and not is_partitioned(t.parameter)]
    lacking = [t for t in working if id(t.parameter) not in got and t.parameter.grad is None]
    ran: list[nn.Module] = []
    if lacking:
        ran = record.again().ran
        order = {layer: i for i, layer in enumerate(ran)}
        called = [t for t in working if t.layer in order and not t.sharded]
        first = min((order[t.layer] for t in called if t.layer is not None), default=None)
        starved = [t for t in called if t.layer is not None and order[t.layer] == first]
        lacking = [t for t in lacking if t.layer is None or t.layer in order or t.sharded]
        if len(lacking) == len(working) or (starved and all(t in lacking for t in starved)):
            return [find_cut(lacking, record.trained, is_checkpointed(record.model))]
    record.keep("no gradient", lacking)
    return []


def check_gradients(record: Record) -> list[Finding]:
    """Before an optimizer's step: gradients that are not finite or all zero, and the dtypes of gradients."""
    found = []
    whole = [t for t in record.trained if t.parameter.grad is not None and not t.taken]
    sizes = find_largest([t.parameter.grad for t in whole])  # type: ignore[misc]
    weights = find_largest([t.parameter for t in whole])
    bad = [t for t, size in zip(whole, sizes, strict=True) if not torch.isfinite(torch.tensor(size))]
    if bad:
        return [locate_not_finite(record, bad)]
    if record.labels and all(record.labels):
        return [find_no_labels(f"all {len(record.labels)} batches of step {record.steps + 1}")]
    # What multiplies something that starts at zero gets no gradient until that has moved.
    starts = {(t.site, t.adapter) for t, size, w in zip(whole, sizes, weights, strict=True) if not w and size}
    zero = [t for t, size in zip(whole, sizes, strict=True) if not size]
    record.keep("zero gradient", [t for t in zero if not t.lookup and (t.site, t.adapter) not in starts])
    record.keep("all zero", whole if whole and len(zero) == len(whole) else [])
    if record.never["all zero"] and record.steps + 1 == STEPS:
        nothing = bool(record.losses) and all(float(loss.sum()) == 0 for loss in record.losses)
        found.append(
            Finding(
                "loss",
                f"every gradient was 0 in both steps, at {show_trained(whole)}"
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
                f"gradients of {show_trained(odd)} are {kinds}",
                "Parameters were cast between backward and step, or grad_dtype was set",
                "cast the model before training",
            )
        )
    return found


def locate_not_finite(record: Record, bad: list[TrainedParameter]) -> Finding:
    """A gradient that is not finite where the loss is."""
    names = {id(t.parameter): t.name for t in record.trained}
    keys = {id(t.parameter) for t in bad}
    at = next((i for i, (key, good) in enumerate(record.arrived) if key in keys and not bool(good)), None)
    if not all(map(bool, record.outer)):
        where, cause = (
            "it comes into the model's output already",
            "The loss computed from the output is not differentiable there",
        )
    elif at is None:
        where, cause = f"at {show_trained(bad)}", "It arose while gradients were added up or scaled"
    else:
        good = [names[key] for key, fine in record.arrived[:at] if bool(fine) and key in names]
        since = f", after {good[-1]}, whose gradient is finite" if good else ", the first that the backward reached"
        where = f"first at {names.get(record.arrived[at][0], bad[0].name)}{since}"
        cause = "The backward of that layer, or of what lies between, divides by 0 or overflows (a root or norm at 0, float16)"
    return Finding(
        "not finite",
        f"{len(bad)} of {len(record.trained)} gradients are NaN or Inf in step {record.steps + 1} though the loss is finite; "
        f"in the order of the backward {where}",
        cause,
        "nothing was updated yet; add an epsilon there, or use bfloat16 or float32",
        fatal=True,
    )


def check_movement(record: Record) -> list[Finding]:
    """After a step: what moved, what the optimizers hold, and in which dtype they remember."""
    before = record.before_step or {}
    held, rates = record.held(), record.rates()
    looked = [t for t in record.trained if id(t.parameter) in before]
    if looked:
        now = [torch.take(t.parameter.detach(), before[id(t.parameter)][0]) for t in looked]
        same = [bool(n == before[id(t.parameter)][1]) for t, n in zip(looked, now, strict=True)]
        record.moved |= {id(t.parameter) for t, still in zip(looked, same, strict=True) if not still}
    due = [t for t in looked if float(before[id(t.parameter)][2])]  # their gradient is not zero
    still = [t for t in due if id(t.parameter) not in record.moved]
    waiting = record.steps < STEPS and held and not any(rates.values())  # a warm-up may begin with a rate of 0
    found = []
    mine = {id(p) for p in record.model.parameters()}
    stale = [k for k, p in held.items() if k not in mine and p.requires_grad and p.grad is None]
    stale = [] if any(t.taken for t in record.trained) else stale
    record.never["stale"] = record.never["stale"] & set(stale) if "stale" in record.never else set(stale)
    lacking = [t for t in still if id(t.parameter) not in held]
    if lacking and not waiting:
        every = [t for t in record.trained if id(t.parameter) not in held and record.live(t)]
        none = not any(id(t.parameter) in held for t in record.trained if record.live(t))
        old = f", and holds {len(stale)} parameters that the model does not have" if stale else ""
        record.never["stale"] = set()
        found.append(
            Finding(
                "optimizer",
                f"the optimizer lacks {len(every)} of {len(record.trained)} trained parameters{old}: {show_trained(every)}",
                "Adapters were attached, attached again or unfrozen after the optimizer was built, or another model's "
                "parameters were given to it",
                ADVICE,
                fatal=none,
            )
        )
    still = [t for t in still if id(t.parameter) in held]
    if still and record.steps == STEPS and not record.moved:
        zero = not any(rates[id(t.parameter)] for t in still)
        half = still[0].parameter.dtype in HALF
        found.append(
            Finding(
                "still",
                f"no trained weight moved in {record.steps} steps though there are gradients: {show_trained(still)}",
                "The learning rate is 0 after the first step as well"
                if zero
                else f"The update is smaller than {still[0].parameter.dtype} can add (learning rate "
                f"{rates[id(still[0].parameter)]:g})"
                if half
                else f"The step of {type(record.optimizers[0]).__name__} changes nothing (learning rate "
                f"{rates[id(still[0].parameter)]:g})",
                "look at lr, the scheduler and its warm-up" if zero else "raise the learning rate, or train in float32",
                fatal=True,
            )
        )
    elif record.steps == STEPS:
        resting = [t for t in still if not rates[id(t.parameter)] or should_move(t, before, rates)]
        if resting:
            rate = rates[id(resting[0].parameter)]
            found.append(
                Finding(
                    "still",
                    f"{len(resting)} of {len(record.trained)} trained weights did not move though they have gradients: "
                    f"{show_trained(resting)}",
                    f"Their parameter group has a learning rate of {rate:g}, or the optimizer leaves them out",
                    "look at the optimizer's parameter groups",
                )
            )
    return [*found, *check_optimizer_state(record)]


def check_optimizer_state(record: Record) -> list[Finding]:
    """The dtype of what optimizers remember."""
    for optimizer in record.optimizers:
        for one in record.trained:
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


def check_frozen(record: Record) -> list[Finding]:
    """Frozen weights and statistics that are no longer what they were."""
    moved = []
    for name, tensor, where, values in record.sample or ():
        now = torch.take(tensor.detach(), where)
        if not bool(((now == values) | (now.isnan() & values.isnan())).all()):
            moved.append((name, isinstance(tensor, nn.Parameter)))
    weights, statistics = [n for n, w in moved if w], [n for n, w in moved if not w]
    record.sample = [s for s in record.sample or () if s[0] not in {n for n, _ in moved}]
    found = []
    if weights:
        found.append(
            Finding(
                "base",
                f"{len(weights)} frozen weights of the base model moved in step {record.steps}: {show_first(weights)}",
                "The optimizer was given them with gradients from before they were frozen, or code writes to them",
                "give the optimizer only what is trained: [p for p in model.parameters() if p.requires_grad]; the adapter "
                "is of no use without the changed base",
            )
        )
    if statistics:
        found.append(
            Finding(
                "statistics",
                f"running statistics of frozen batch norms move: {show_first(statistics)}",
                "A model in train mode updates them, and the adapter's file does not hold them",
                "call .eval() on these layers after model.train()",
            )
        )
    return found


def conclude(record: Record) -> list[Finding]:
    """After the last step: what was so in each."""
    by_key = {id(t.parameter): t for t in record.trained}
    found = []
    lacking = [by_key[k] for k in record.never.get("no gradient", ()) if k in by_key]
    if lacking:
        found.append(find_unused(sort_like(lacking, record.trained)))
    zero = [by_key[k] for k in record.never.get("zero gradient", ()) if k in by_key]
    if zero and not any(f.kind == "loss" for f in record.findings):
        found.append(
            Finding(
                "zero gradient",
                f"the gradient of {len(zero)} of {len(record.trained)} trained parameters was 0 in both steps: "
                f"{show_trained(sort_like(zero, record.trained))}",
                "What these layers return is multiplied by 0 or masked later on, or both factors of an adapter are 0",
                "look at the layers behind them and at the adapter's start, or leave them out of target_modules",
            )
        )
    if stale := record.never.get("stale"):
        found.append(
            Finding(
                "stale",
                f"the optimizer holds {len(stale)} parameters that the model does not have and that get no gradient",
                "They are of an adapter that was deleted or attached again after the optimizer was built",
                ADVICE,
            )
        )
    idle = [t for t in record.trained if not record.live(t)]
    if idle:
        names = show_names(list(dict.fromkeys(str(t.adapter) for t in idle)))
        found.append(
            Finding(
                "idle",
                f"adapters {names} are trained and were not at work: {show_trained(idle)}",
                "They are not active, or merged",
                f"activate them with set_adapter, or freeze them with model.set_requires_grad({names}, False)",
            )
        )
    return found


def find_unstepped(record: Record, *, fatal: bool) -> Finding:
    kind = type(record.optimizers[0]).__name__
    if record.overflow:
        return Finding(
            "still",
            f"gradients were NaN or Inf and {kind} made no step, {max(record.discarded, 1)} times in a row",
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


def find_cut(lacking: Sequence[TrainedParameter], every: Sequence[TrainedParameter], checkpoints: bool) -> Finding:
    where = f"{len(lacking)} of {len(every)} trained parameters in the first training step: {show_trained(lacking)}"
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


def find_unused(lacking: Sequence[TrainedParameter]) -> Finding:
    return Finding(
        "no gradient",
        f"no gradient reached {show_trained(lacking)} in the first training step",
        "The loss may not depend on what these layers return, and then they learn nothing",
        "leave them out of target_modules",
    )


def find_no_labels(what: str) -> Finding:
    return Finding(
        "labels",
        f"all labels are {IGNORED}: {what}",
        "Prompts fill max_length and cut their completions off, or a collator masks everything",
        "raise max_length, or look at the labels of a batch",
        fatal=True,
    )


def should_move(
    one: TrainedParameter, before: dict[int, tuple[Tensor, Tensor, Tensor]], rates: dict[int, float]
) -> bool:
    """Whether a step should have moved a float32 parameter by more than its precision."""
    _, value, gradient = before[id(one.parameter)]
    step = rates[id(one.parameter)] * min(abs(float(gradient)), 1.0)
    return one.parameter.dtype == torch.float32 and step > 8 * torch.finfo(torch.float32).eps * abs(float(value)) > 0
