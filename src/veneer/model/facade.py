"""The base of `PeftModel`: it holds the base model and shows what is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..lifecycle.adapters import Runtime
from ..methods.base import Method
from .status import get_layer_status, get_model_status

if TYPE_CHECKING:
    from .status import TunerLayerStatus, TunerModelStatus


class BaseTuner(nn.Module):
    """Holds the adapted base model as `.model`, so that paths read `base_model.model...` as in peft."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class ModelFacade(nn.Module):
    """A base model whose adapters are shown under peft's names; attributes that it lacks are the base model's."""

    base_model: BaseTuner

    @property
    def runtime(self) -> Runtime:
        found: Runtime = self.__dict__["_runtime"]
        return found

    def get_base_model(self) -> nn.Module:
        """The base model, with its adapters on it."""
        model: nn.Module = self.base_model.model
        return model

    @property
    def peft_config(self) -> dict[str, Method]:
        """Adapter name -> its config."""
        return self.runtime.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters in the order in which they are stacked."""
        return list(self.runtime.router.active)

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> Method:
        return self.peft_config[self.runtime.router.active[0]]

    @property
    def peft_type(self) -> str | None:
        return self.active_peft_config.peft_type

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trained and of all parameters; tied ones count once."""
        trained = total = 0
        for parameter in self.parameters():
            n = getattr(parameter, "ds_numel", 0) or parameter.numel()  # under ZeRO-3 a shard is empty
            total += n
            trained += n if parameter.requires_grad else 0
        return trained, total

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `veneer.convert_to_lora` can turn an adapter into a LoRA."""
        from ..export.to_lora import check_convertible

        return check_convertible(self.runtime, adapter_name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)
