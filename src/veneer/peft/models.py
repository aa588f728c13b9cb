"""peft's classes of models. A model of Veneer's has one class; which of peft's it is follows from its task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..files import state_dict
from ..lifecycle.adapters import runtime_of
from ..lifecycle.load_report import LoadReport
from ..methods.base import Method
from ..methods.peft_types import TaskType
from ..model import peft_model as core

PeftModel = core.PeftModel


class _OfTask(type):
    task: str | None

    def __instancecheck__(cls, model: object) -> bool:
        if not isinstance(model, core.PeftModel) or not model.peft_config:
            return False
        task = model.active_peft_config.task_type if model.active_adapters else None
        return cls.task is None or task == cls.task

    def __subclasscheck__(cls, found: type) -> bool:
        return issubclass(found, core.PeftModel)

    def __call__(cls, model: nn.Module, peft_config: Method, adapter_name: str = "default", **kwargs: Any) -> Any:
        if cls.task is not None and peft_config.task_type is None:
            peft_config = peft_config.replace(task_type=cls.task)
        return core.PeftModel(model, peft_config, adapter_name, **kwargs)

    def from_pretrained(cls, model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> Any:
        return core.PeftModel.from_pretrained(model, model_id, *args, **kwargs)


def of_task(name: str, task: str | None) -> Any:
    return _OfTask(name, (), {"task": task, "__module__": "peft", "__doc__": f"A model for {task or 'any task'}."})


PeftModelForCausalLM = of_task("PeftModelForCausalLM", TaskType.CAUSAL_LM)
PeftModelForSeq2SeqLM = of_task("PeftModelForSeq2SeqLM", TaskType.SEQ_2_SEQ_LM)
PeftModelForSequenceClassification = of_task("PeftModelForSequenceClassification", TaskType.SEQ_CLS)
PeftModelForTokenClassification = of_task("PeftModelForTokenClassification", TaskType.TOKEN_CLS)
PeftModelForQuestionAnswering = of_task("PeftModelForQuestionAnswering", TaskType.QUESTION_ANS)
PeftModelForFeatureExtraction = of_task("PeftModelForFeatureExtraction", TaskType.FEATURE_EXTRACTION)
PeftMixedModel = of_task("PeftMixedModel", None)

MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def inject_adapter_in_model(
    peft_config: Method, model: nn.Module, adapter_name: str = "default", low_cpu_mem_usage: bool = False, **kwargs: Any
) -> nn.Module:
    """As `veneer.inject_adapter_in_model`; the model gets a `peft_config`, which frameworks look at."""
    made = core.inject_adapter_in_model(peft_config, model, adapter_name, low_cpu_mem_usage, **kwargs)
    runtime = runtime_of(model)
    assert runtime is not None
    model.peft_config = Configs(runtime.configs)  # type: ignore[assignment]
    return made


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> LoadReport:
    """As `veneer.set_peft_model_state_dict`; keys that do not fit are reported in the result, and in a warning."""
    return state_dict.set_peft_model_state_dict(
        model, peft_model_state_dict, adapter_name, *args, **{"strict": False, **kwargs}
    )


class Configs(dict[str, Method]):
    """The configs of a model's adapters as peft keeps them on it; what frameworks pop is deleted on the model by then."""
