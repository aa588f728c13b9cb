"""The face people use: `get_peft_model`, `PeftModel` and the functions around them, with peft's names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..lifecycle.adapters import Runtime
from ..lifecycle.detach import delete_adapter, unload_adapters
from ..lifecycle.keys import PREFIX
from ..methods.base import Method
from ..methods.registry import registry
from ..training.attach import attach_watched
from .controls import AdapterControls
from .facade import BaseTuner
from .persistence import AdapterPersistence, with_base_name

if TYPE_CHECKING:
    pass


class PeftModel(AdapterControls, AdapterPersistence):
    """A base model with adapters on it.

    The base model's layers are adapted in place; this is a thin facade with the operations on adapters. Attributes
    it does not have are looked up on the base model.

    Args:
        model: the base model; its parameters are frozen.
        peft_config: the method; copied, so changing it later does not change the adapter.
        adapter_name: name of the adapter, without '/', '.' and ':'.
        autocast_adapter_dtype: keep adapter parameters in float32 where the base is in float16 or bfloat16.
        low_cpu_mem_usage: make the adapter on the meta device, to be filled by a file.

    Raises:
        ValueError: targets that do not exist, a hyper-parameter that does not fit a layer, a name that is taken.
        RuntimeError: the model is sharded already.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Method,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self._wrap(model)
        attach_watched(
            self.runtime,
            adapter_name,
            peft_config,
            trainable=not peft_config.inference_mode,
            autocast=autocast_adapter_dtype,
            meta=low_cpu_mem_usage,
        )
        self.runtime.activate(adapter_name)

    def _wrap(self, model: nn.Module) -> None:
        if isinstance(model, PeftModel):
            raise ValueError("this is a PeftModel already; add another adapter with model.add_adapter(name, config)")
        self.base_model = BaseTuner(model)
        self.__dict__["_runtime"] = Runtime.ensure(model)
        self.__class__ = facade_of(type(model))
        if uses_checkpointing(model) and hasattr(model, "enable_input_require_grads"):
            cast(
                Any, model
            ).enable_input_require_grads()  # else a checkpointed block sees no input that needs a gradient

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Method | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        strict: bool = True,
        adapters: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a saved adapter, or several, onto a base model.

        Arguments and errors are those of `load_adapter`, and:

        Args:
            adapters: "all" loads every adapter that the folder holds and makes those active that were when it was
                saved; a list of names loads these, and makes them active in that order. None loads the one adapter
                that lies in the folder itself, as `adapter_name`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._wrap(model)
        before = set(made.peft_config)
        if adapters is not None:
            try:
                made._load_set(model_id, adapters, is_trainable, autocast_adapter_dtype, strict, kwargs)
            except BaseException:
                if made.peft_config and not before:
                    unload_adapters(made.runtime)
                for name in [n for n in made.peft_config if n not in before]:
                    delete_adapter(made.runtime, name)
                raise
            return made
        if config is not None:
            kwargs["config"] = config
        made.load_adapter(
            model_id, adapter_name, is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, strict=strict, **kwargs
        )
        made.runtime.activate(adapter_name)
        if not is_trainable:
            made.eval()
        return made

    def __reduce_ex__(self, protocol: object) -> Any:
        return _rebuild, (type(self.get_base_model()),), self.__dict__


_FACADES: dict[type[nn.Module], type[PeftModel]] = {}


def facade_of(base: type[nn.Module]) -> type[PeftModel]:
    """`PeftModel` with the signature of `base.forward`, named after its task as in peft.

    transformers' Trainer reads a model's inputs and labels off the signature of its class, and drops every column of
    the data that it does not find there.
    """
    if base in _FACADES:
        return _FACADES[base]

    def forward(self: PeftModel, *args: object, **kwargs: object) -> Any:
        return PeftModel.forward(self, *args, **kwargs)

    forward.__doc__ = PeftModel.forward.__doc__
    forward.__signature__ = with_inputs_of_methods(inspect.signature(base.forward))  # type: ignore[attr-defined]
    task = base.__name__.partition("For")[2]
    name = f"PeftModelFor{task}" if task else "PeftModel"
    _FACADES[base] = type(name, (PeftModel,), {"forward": forward, "__module__": __name__})
    return _FACADES[base]


def with_inputs_of_methods(signature: inspect.Signature) -> inspect.Signature:
    """A forward's signature with what single methods take besides: `task_ids`, and inputs of their objectives."""
    extra = dict.fromkeys(["task_ids", *(name for cls in registry().values() for name in cls.extra_inputs)])
    own = list(signature.parameters.values())
    new = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
        for n in extra
        if n not in signature.parameters
    ]
    rest = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in own if p not in rest), *new, *rest])


def _rebuild(base: type[nn.Module]) -> PeftModel:
    cls = facade_of(base)
    return cls.__new__(cls)


def uses_checkpointing(model: nn.Module) -> bool:
    """Whether a transformers model has gradient checkpointing on."""
    return any(m.__dict__.get("gradient_checkpointing", False) for m in model.modules())


def get_peft_model(
    model: nn.Module,
    peft_config: Method,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a fresh adapter on a base model and return both as a `PeftModel`.

    Args:
        model: any `nn.Module`; its parameters are frozen and its layers adapted in place.
        peft_config: the method and its hyper-parameters.
        adapter_name: name of the adapter.
        mixed: accepted; adapters of different methods can always share a model.
        autocast_adapter_dtype: keep adapter parameters in float32 where the base is in half precision.
        revision: revision of the base model, kept in the config.
        low_cpu_mem_usage: make the adapter on the meta device, to be filled by a file.

    Raises:
        TypeError: `peft_config` is no config.
        ValueError: see `PeftModel`.
    """
    if not isinstance(peft_config, Method):
        raise TypeError(
            f"get_peft_model: peft_config is a {type(peft_config).__name__}; pass a config such as LoraConfig(r=8)"
        )
    config = with_base_name(peft_config, model)
    if revision is not None:
        config = config.replace(revision=revision)
    return PeftModel(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: Method,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on a model in place and return the model itself, without a `PeftModel` around it.

    Args:
        peft_config: the method.
        model: any `nn.Module`.
        adapter_name: name of the adapter; it becomes the active one.
        low_cpu_mem_usage: make its tensors on the meta device.
        state_dict: values for its tensors, by key with or without `base_model.model.`.
    """
    runtime = Runtime.ensure(model)
    prefix = PREFIX if state_dict and any(k.startswith(PREFIX) for k in state_dict) else ""
    attach_watched(
        runtime,
        adapter_name,
        peft_config,
        tensors=state_dict,
        prefix=prefix,
        trainable=not peft_config.inference_mode,
        meta=low_cpu_mem_usage,
    )
    runtime.activate(adapter_name)
    return model
