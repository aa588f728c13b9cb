"""What scripts and frameworks touch on peft's layers, as a view of a layer that Veneer adapts in place.

An adapted layer of Veneer is still the layer it was; its class is a generated one with the mixin `Adapted`. While
Veneer stands in, these names are on that mixin. A base layer's own attributes come first.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..algebra.operator import Operator
from ..injection.class_swap import Adapted
from ..injection.dispatch import AdaptedState
from ..injection.entries import AdaptedSite, AdapterAtSite, copy_name, term_of
from ..injection.interceptors import ModuleCopies
from ..injection.router import adapter_names
from ..layers.shallow_copy import shallow_copy
from ..lifecycle.adapters import Runtime
from ..lifecycle.detach import delete_adapter
from ..lifecycle.merge import merge_adapters, merge_again, unmerge_adapters
from ..methods.lora import LoraConfig
from ..methods.registry import METHODS


def state_of(layer: nn.Module) -> AdaptedState:
    found: AdaptedState = layer.__dict__["_veneer"]
    return found


def runtime_at(layer: nn.Module) -> Runtime:
    """The adapters of the model that the layer is in."""
    found: Runtime = state_of(layer).router.runtime()
    return found


def sites_at(layer: nn.Module) -> list[AdaptedSite]:
    """The places on a layer at which weights are adapted."""
    state = state_of(layer)
    return [] if state.weights is None else [s for s in state.weights.sites if s.backend is not None]


def entries_at(layer: nn.Module) -> dict[str, tuple[AdaptedSite, AdapterAtSite]]:
    """Adapter -> its place on the layer and what it has there."""
    return {name: (site, entry) for site in sites_at(layer) for name, entry in site.entries.items()}


def is_layer(module: object) -> bool:
    """Whether adapters act on a module's weights; rows of `trainable_token_indices` do not count."""
    if not isinstance(module, Adapted) or "_veneer" not in module.__dict__:
        return False
    return any(not getattr(e.method, "wrapped", False) for _, e in entries_at(module).values())  # type: ignore[arg-type]


def is_copied(module: nn.Module) -> bool:
    """Whether adapters bring full copies of a module, or rows of its table."""
    return "_veneer" in module.__dict__ and state_of(module).find(ModuleCopies) is not None


class Factor:
    """One tensor of an adapter, with the attributes of the small layer that holds it in peft."""

    def __init__(self, owner: nn.Module, attribute: str, bias: str | None) -> None:
        self._owner, self._attribute, self._bias = owner, attribute, bias

    @property
    def weight(self) -> Tensor:
        found = self._owner._parameters[self._attribute]
        assert found is not None
        return found

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._owner._parameters[self._attribute] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._owner._parameters.get(self._bias)

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def parameters(self) -> Iterator[Tensor]:
        yield from (t for t in (self.weight, self.bias) if t is not None)

    def to(self, *args: Any, **kwargs: Any) -> Factor:
        for t in self.parameters():
            t.data = t.data.to(*args, **kwargs)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Factor:
        for t in self.parameters():
            t.requires_grad_(requires_grad)
        return self


class Table(Mapping[str, Any]):
    """One of a layer's tensors for each adapter that has it, as peft's ModuleDict or ParameterDict.

    Its keys in the file begin with `name`: `lora_B.weight` and `lora_B.bias` are one small layer, `ia3_l` one tensor.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer, self._name = layer, name

    def _attributes(self, adapter: str) -> dict[str, str]:
        """Part of the small layer ("weight", "bias"; "" for a bare tensor) -> attribute of the layer."""
        _, entry = entries_at(self._layer)[adapter]
        found = {}
        for key, attribute in (*entry.trained, *entry.frozen):
            head, _, part = entry.names.get(key, "").partition(".")
            if head == self._name:
                in_layer = f"{head}.weight" in entry.method.declared(key).reads
                found["weight" if in_layer else part] = attribute
        return found

    def __getitem__(self, adapter: str) -> Any:
        if adapter not in self:
            raise KeyError(adapter)
        site, own = entries_at(self._layer)[adapter][0], self._attributes(adapter)
        if "" in own:
            return site.owner._parameters[own[""]]
        return Factor(site.owner, own["weight"], own.get("bias"))

    def __setitem__(self, adapter: str, value: object) -> None:
        own = self._attributes(adapter)
        if not own or not isinstance(value, Tensor):
            raise KeyError(f"{adapter}: only tensors that are there can be replaced; add adapters to the model")
        owner, attribute = entries_at(self._layer)[adapter][0].owner, own[""] if "" in own else own["weight"]
        owner._parameters[attribute] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    def __iter__(self) -> Iterator[str]:
        return (name for name in entries_at(self._layer) if self._attributes(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(n == name for n in self)


class Scaling(MutableMapping[str, float]):
    """What each adapter's change is multiplied by here; setting it holds for this layer alone."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> float:
        method = entries_at(self._layer)[name][1].method
        if not isinstance(method, LoraConfig):
            raise KeyError(name)
        return method.scale

    def __setitem__(self, name: str, value: float) -> None:
        site, entry = entries_at(self._layer)[name]
        changed, start = copy.copy(entry.method), entry.original
        if not isinstance(changed, LoraConfig) or not isinstance(start, LoraConfig):
            raise KeyError(name)
        changed.lora_alpha = float(value) * start.lora_alpha / start.scale
        entry.method = changed
        site.router.changed()
        if site.original is not None and name in adapter_names(site.router.merged):
            merge_again(runtime_at(self._layer), site)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter always has a scaling; delete the adapter from the model")

    def __iter__(self) -> Iterator[str]:
        return (n for n, (_, e) in entries_at(self._layer).items() if isinstance(e.method, LoraConfig))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def start_values(layer: nn.Module, name: str) -> float:
    """An adapter's scaling as its config says it, whatever was set since."""
    original = entries_at(layer)[name][1].original
    if not isinstance(original, LoraConfig):
        raise KeyError(name)
    return original.scale


class View:
    """The names. Only what is defined here is shown on adapted layers."""

    @property
    def base_layer(self: Any) -> nn.Module:
        return shallow_copy(self)

    def get_base_layer(self: Any) -> nn.Module:
        return shallow_copy(self)

    @property
    def scaling(self: Any) -> Scaling:
        return Scaling(self)

    @property
    def r(self: Any) -> dict[str, int]:
        return {n: e.method.r for n, (_, e) in entries_at(self).items() if hasattr(e.method, "r")}

    @property
    def lora_alpha(self: Any) -> dict[str, float]:
        return {
            n: e.original.lora_alpha for n, (_, e) in entries_at(self).items() if isinstance(e.original, LoraConfig)
        }

    @property
    def use_dora(self: Any) -> dict[str, bool]:
        return {n: e.method.use_dora for n, (_, e) in entries_at(self).items() if isinstance(e.method, LoraConfig)}

    @property
    def active_adapters(self: Any) -> list[str]:
        return list(state_of(self).router.active)

    @property
    def active_adapter(self: Any) -> list[str]:
        return list(state_of(self).router.active)

    @property
    def disable_adapters(self: Any) -> bool:
        return not state_of(self).router.enabled

    @property
    def merged_adapters(self: Any) -> list[str]:
        return list(adapter_names(state_of(self).router.merged))

    @property
    def merged(self: Any) -> bool:
        return bool(state_of(self).router.merged)

    def set_adapter(self: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As in peft, what is active is trained and what is not is frozen. The choice is the model's."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        runtime_at(self).activate([n for n in names if n in runtime_at(self).configs])
        for name, parameters in own_parameters(self).items():
            for p in parameters:
                p.requires_grad_(name in names and not inference_mode)

    def enable_adapters(self: Any, enabled: bool) -> None:
        state_of(self).router.set(enabled=enabled)
        for name, parameters in own_parameters(self).items():
            for p in parameters:
                p.requires_grad_(enabled and name in self.active_adapters)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """From the whole model: an adapter is there or it is not."""
        if adapter_name in runtime_at(self).configs:
            delete_adapter(runtime_at(self), adapter_name)

    @property
    def modules_to_save(self: Any) -> dict[str, nn.Module]:
        """Adapter -> its full copy of this module."""
        return {n.removeprefix(copy_name("")): m for n, m in self._modules.items() if n.startswith(copy_name(""))}

    @property
    def original_module(self: Any) -> nn.Module:
        return shallow_copy(self)


class ScaledView(View):
    """The names for scales, merging and changes of the weight."""

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale * start_values(self, adapter)

    def scale_layer(self: Any, scale: float) -> None:
        for name in self.active_adapters:
            if scale != 1 and name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = start_values(self, name) if scale is None else self.scaling[name] / scale

    def merge(self: Any, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Of the whole model, once: adapters are merged everywhere or nowhere."""
        names = list(adapter_names) if adapter_names is not None else self.active_adapters
        if any(n not in self.merged_adapters for n in names if n in runtime_at(self).configs):
            merge_adapters(runtime_at(self), [n for n in names if n in runtime_at(self).configs], check=safe_merge)

    def unmerge(self: Any) -> None:
        if self.merged:
            unmerge_adapters(runtime_at(self))

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """The change of the weight, in its own layout."""
        site, entry = entries_at(self)[adapter]
        op: Operator | None = term_of(entry.method, site.tensors(adapter), site).delta
        if op is None:
            raise TypeError(f"{site.name}: {entry.method.peft_name} changes the weight by more than a sum")
        weight = site.weight()
        return site.kind.restored(site, site.kind.delta_matrix(site, op, weight)).detach()


def own_parameters(layer: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Adapter -> what is trained of it at a layer."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, (site, entry) in entries_at(layer).items():
        found[name] = [p for _, a in entry.trained if (p := site.owner._parameters.get(a)) is not None]
    for name, module in layer._modules.items():
        if name.startswith(copy_name("")) and module is not None:
            found.setdefault(name.removeprefix(copy_name("")), []).extend(module.parameters())
    return found


class Seen:
    """An attribute that is computed, unless the layer has one of that name: attention has a `scaling` of its own."""

    def __init__(self, compute: Any) -> None:
        self.compute = compute

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        return self if layer is None else self.compute(layer)


def table_names() -> set[str]:
    """Names of the tables on layers, from the names that methods give their tensors: `lora_A`, `ia3_l`."""
    layered = [cls for cls in METHODS.values() if cls.acts_on == "layers"]
    tensors = [t for cls in layered for t in cls.tensors.values() if t.shared == ""]
    heads = {name.partition(".")[0] for t in tensors for name in (t.name, t.embedding) if name}
    return heads - {"weight", "bias", "base_layer"}  # the layer's own


@functools.cache
def shown() -> dict[str, Any]:
    """Every name that is put on adapted layers."""
    own = {
        n: Seen(v.fget) if isinstance(v, property) else v
        for cls in (View, ScaledView)
        for n, v in vars(cls).items()
        if not n.startswith("__")
    }
    return {name: Seen(functools.partial(Table, name=name)) for name in table_names()} | own


def show_view() -> None:
    """Put the names on adapted layers."""
    for name, value in shown().items():
        setattr(Adapted, name, value)


def hide_view() -> None:
    """Take them off again."""
    for name in shown():
        if name in Adapted.__dict__:
            delattr(Adapted, name)
