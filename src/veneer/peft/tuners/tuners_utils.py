"""peft.tuners.tuners_utils: what an adapted layer, and a model of adapters, is an instance of."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...methods.base import Method
from ...methods.registry import METHODS
from ...model.facade import BaseTuner as _Holder
from ...model.peft_model import PeftModel
from ..layers import entries_at, is_layer


class _Layer(type):
    method: str | None = None
    base: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module

    def __instancecheck__(cls, module: object) -> bool:
        if not is_layer(module) or not isinstance(module, cls.base):
            return False
        return cls.method is None or any(e.method.peft_name == cls.method for _, e in entries_at(module).values())


def layer_of(name: str, method: str | None, base: object = nn.Module) -> Any:
    """A class whose instances are the adapted layers with a method."""
    body = {"method": method, "base": base, "__module__": "peft", "__doc__": f"Adapted layers ({method or 'any'})."}
    return _Layer(name, (), body)


BaseTunerLayer = layer_of("BaseTunerLayer", None)


class _Tuner(type):
    method: str | None = None

    def __instancecheck__(cls, model: object) -> bool:
        if not isinstance(model, _Holder):
            return False
        runtime = model.model.__dict__.get("_veneer_runtime")
        found = [] if runtime is None else list(runtime.configs.values())
        return cls.method is None or any(c.peft_name == cls.method for c in found)

    def __call__(cls, model: nn.Module, config: Method | dict[str, Method], adapter_name: str = "default") -> Any:
        one = config[adapter_name] if isinstance(config, dict) else config
        return PeftModel(model, one, adapter_name).base_model


def tuner_of(name: str, method: str | None) -> Any:
    """A class whose instances are what `PeftModel.base_model` is with a method."""
    return _Tuner(name, (), {"method": method, "__module__": "peft", "__doc__": f"Models with {method or 'adapters'}."})


BaseTuner = tuner_of("BaseTuner", None)


def stem_of(cls: type[Method]) -> str:
    """What the names of a method's classes begin with: `LoHa` of `LoHaConfig`."""
    return cls.__name__.removesuffix("Config")


TUNERS = {
    name: tuner_of(f"{stem_of(cls)}Model", name)
    for name, cls in METHODS.items()
    if cls.acts_on in ("layers", "modules")
}
MODELS = {f"{stem_of(METHODS[name])}Model": tuner for name, tuner in TUNERS.items()}


def __getattr__(name: str) -> Any:
    if name in MODELS:
        return MODELS[name]
    raise AttributeError(f"module 'peft.tuners.tuners_utils' has no attribute {name!r}")
