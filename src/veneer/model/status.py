"""What is adapted, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..files import adapter_files
from ..injection.entries import copy_name
from ..injection.router import adapter_names


@dataclass
class TunerLayerStatus:
    """One adapted layer. Fields are peft's."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class TunerModelStatus:
    """All adapted layers together. Fields are peft's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str] = field(default_factory=dict)
    available_adapters: list[str] = field(default_factory=list)
    devices: dict[str, list[str]] = field(default_factory=dict)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """What every adapted layer holds: its adapters, which are active, merged, trained, and where they are."""
    runtime = adapter_files.runtime_on(model)
    router = runtime.router
    found = []
    for site in runtime.sites.values():
        grads: dict[str, bool | str] = {}
        devices = {}
        for name, entry in site.entries.items():
            if site.kind.whole:
                held = list(runtime.layers[site.name]._modules[copy_name(name)].parameters())  # type: ignore[union-attr]
            else:
                held = [site.owner._parameters[a] for _, a in entry.trained]
            flags = {p.requires_grad for p in held}
            grads[name] = flags.pop() if len(flags) == 1 else "irregular"
            devices[name] = sorted({str(p.device) for p in held})
        found.append(
            TunerLayerStatus(
                name=f"model.{site.name}",
                module_type=site.kind.name,
                enabled=router.enabled,
                active_adapters=[n for n in router.active if n in site.entries],
                merged_adapters=[n for n in adapter_names(router.merged) if n in site.entries],
                requires_grad=grads,
                available_adapters=sorted(site.entries),
                devices=devices,
            )
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The adapted model as a whole; see `get_layer_status`."""
    runtime = adapter_files.runtime_on(model)
    status = get_layer_status(model)
    base = runtime.root
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    grads: dict[str, bool | str] = {}
    devices: dict[str, set[str]] = {}
    for layer in status:
        for name, flag in layer.requires_grad.items():
            grads[name] = flag if grads.get(name, flag) == flag else "irregular"
            devices.setdefault(name, set()).update(layer.devices[name])
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type="None" if model is base else type(model).__name__,
        peft_types={n: str(c.peft_type) for n, c in runtime.configs.items()},
        trainable_params=trained,
        total_params=sum(p.numel() for p in base.parameters()),
        num_adapter_layers=len(status),
        enabled=runtime.router.enabled,
        active_adapters=list(runtime.router.active),
        merged_adapters=list(adapter_names(runtime.router.merged)),
        requires_grad=grads,
        available_adapters=sorted(runtime.configs),
        devices={n: sorted(d) for n, d in devices.items()},
    )
