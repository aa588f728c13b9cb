"""Attaching an adapter: planned first, then put into the model as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..backends import prepare_for_gradients
from ..backends.base import tensor_of
from ..distributed import offload, sharding, tensor_parallel, torch_fastpath
from ..injection.class_swap import adapt_class, adapted_class, restore_class
from ..injection.dispatch import state_of
from ..injection.entries import AdaptedSite, copy_name
from ..injection.interceptors import FusedNetwork, Interceptor, ResidualTaps, SiblingScope
from ..methods.base import Method
from .adapters import ATTRIBUTE, Runtime, runtime_of
from .keys import PREFIX
from .load_report import LoadReport
from .plan import AttachPlan, check_name


def attach_adapter(
    runtime: Runtime,
    adapter: str,
    config: Method,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    prefix: str = PREFIX,
    strict: bool = True,
    trainable: bool = True,
    autocast: bool = True,
    meta: bool = False,
) -> LoadReport:
    """Add an adapter. Either all of it is attached or nothing is changed.

    Args:
        runtime: of the base model.
        adapter: its name.
        config: copied, so changing it later does not change the adapter.
        tensors: values by their key in the file; None starts fresh.
        prefix: before the names of modules in the keys of `tensors`.
        strict: whether keys that do not fit raise, or only warn.
        trainable: `requires_grad` of the adapter's parameters.
        autocast: keep the parameters in float32 if the base is in half precision.
        meta: make fresh tensors on the meta device.

    Raises:
        ValueError: a name that is taken or not allowed; targets that do not exist; a hyper-parameter that does not fit
            a layer.
        AdapterLoadError: `tensors` do not fit and `strict` is set.
        RuntimeError: the model's parameters are already sharded.
    """
    check_name(adapter, runtime.configs)
    modules = dict(runtime.root.named_modules())
    with tensor_parallel.replicate_plain():
        sharding.refuse_attaching(runtime.root, modules)
        planner = runtime.planner(
            adapter, modules, tensors=tensors, prefix=prefix, strict=strict, autocast=autocast, meta=meta
        )
        plan = planner.plan_adapter(config)
        _commit_plan(runtime, adapter, plan, trainable, modules)
    return plan.report


def freeze_base(runtime: Runtime) -> None:
    """Freeze the base model on the first attach, and store the runtime on it."""
    if runtime_of(runtime.root) is None:
        prepare_for_gradients(runtime.root)
        runtime.known_base()
        runtime.root.requires_grad_(False)
        runtime.root.__dict__[ATTRIBUTE] = runtime


def _commit_plan(
    runtime: Runtime, adapter: str, plan: AttachPlan, trainable: bool, modules: Mapping[str, nn.Module]
) -> None:
    """Put a finished plan into the model."""
    freeze_base(runtime)
    sites = []
    for place in plan.sites:
        site, layer = place.site, place.layer
        state = adapt_class(layer, runtime.router)
        if place.door is not None:
            from ..prompts.prompt_stack import attach_stack

            attach_stack(place.door, runtime.router)
        else:
            state.intercept(place.interceptor, site)
        if site.spot is not None and site.spot.residual:
            residual = runtime.root.get_submodule(site.spot.residual)
            adapt_class(residual, runtime.router).intercept(ResidualTaps, site)
        frozen = {attr for _, attr in place.entry.frozen}
        for attr, value in site.split(place.values, place.entry).items():
            if attr in frozen:
                site.owner._buffers[attr] = value
                site.owner._non_persistent_buffers_set.add(attr)
            elif isinstance(value, nn.Parameter):  # shared by several sites
                value.requires_grad = trainable
                site.owner._parameters[attr] = value
            else:
                site.owner._parameters[attr] = made = nn.Parameter(value, requires_grad=trainable)
                if sharding.is_distributed(value):
                    tensor_parallel.gather_gradients(made)
        if place.whole is not None:
            place.whole.requires_grad_(trainable)
            layer._modules[copy_name(adapter)] = place.whole
        follows = place.is_layer and place.entry.method.first_for_all and not site.lookup  # a tied head
        if follows or (place.whole is not None and layer._parameters):
            layer.__class__ = adapted_class(state.base, read=True)
        offload.keep_resident(site.owner)
        site.entries[adapter] = place.entry
        runtime.sites[site.name] = site
        runtime.layers[site.name] = layer
        sites.append(site)
    for key, tensor in plan.shared.items():
        trained = plan.config.declared(key).trained
        runtime.router.shared.put(adapter, key, nn.Parameter(tensor, requires_grad=trainable) if trained else tensor)
        runtime.root._modules.setdefault("veneer_shared", runtime.router.shared)
    for module, param, value in plan.overrides.values():
        with torch.no_grad():
            tensor_of(module, param).copy_(value)
    if any(issubclass(k, nn.TransformerEncoderLayer) for k in {type(m) for m in modules.values()}):
        torch_fastpath.disable_fastpath(runtime.root, [runtime.layers[s.name] for s in sites])
    if any(place.door is not None for place in plan.sites):
        from ..prompts.prompt_stack import link_encoder

        link_encoder(runtime.sites.values())
    runtime.configs[adapter] = plan.config
    runtime.places[adapter] = sites
    regroup_layers(runtime, sites, modules)


def regroup_layers(
    runtime: Runtime, sites: Iterable[AdaptedSite], modules: Mapping[str, nn.Module] | None = None
) -> None:
    """Find which layers can run fused, among those of `sites` and beside them.

    Args:
        runtime: of the base model.
        sites: those that an adapter was added to or removed from.
        modules: the model's modules by name; None looks each parent up.
    """
    from ..kernels.plan import arrange_groups

    linear = [s for s in sites if s.kind.own_forward() is not None or s.kind.packable]
    names = dict.fromkeys(s.name.rpartition(".")[0] for s in linear)
    parents = {n: runtime.root.get_submodule(n) for n in names if modules is None or n in modules}
    for parent, found in arrange_groups(parents.values()).items():
        _set_interceptor(runtime, parent, SiblingScope, SiblingScope() if found.grouped else None)
        _set_interceptor(runtime, parent, FusedNetwork, None if found.network is None else FusedNetwork(found.network))
    runtime.router.changed()


def _set_interceptor(
    runtime: Runtime, module: nn.Module, kind: type[Interceptor], interceptor: Interceptor | None
) -> None:
    """Give a module this interceptor of its kind, or none."""
    if interceptor is not None:
        adapt_class(module, runtime.router).insert(interceptor)
        return
    state = state_of(module)
    if state is not None and state.find(kind) is not None:
        state.remove(kind)
        if not state.in_use:
            restore_class(module)
