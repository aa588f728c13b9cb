"""Veneer: fine-tune large pretrained models by training a thin layer on frozen weights.

Public names are peft's. Importing the package imports torch and nothing heavy; names are resolved on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors
    from .checks.verify import verify as verify
    from .export.dense import DenseReport as DenseReport
    from .export.dense import export_dense as export_dense
    from .export.to_lora import convert_to_lora as convert_to_lora
    from .export.to_lora import save_as_lora as save_as_lora
    from .files.certificate import Certificate as Certificate
    from .files.certificate import CertificateWarning as CertificateWarning
    from .files.state_dict import get_peft_model_state_dict as get_peft_model_state_dict
    from .files.state_dict import load_peft_weights as load_peft_weights
    from .files.state_dict import set_peft_model_state_dict as set_peft_model_state_dict
    from .injection.router import Average as Average
    from .injection.router import Parallel as Parallel
    from .interop.trainer import WatchCallback as WatchCallback
    from .io.fingerprint import BaseMismatchWarning as BaseMismatchWarning
    from .lifecycle.load_report import AdapterLoadError as AdapterLoadError
    from .methods.adapter_fusion import AdapterFusionConfig as AdapterFusionConfig
    from .methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from .methods.base import PeftConfig as PeftConfig
    from .methods.bitfit import BitFitConfig as BitFitConfig
    from .methods.bottleneck import BottleneckConfig as BottleneckConfig
    from .methods.cpt import CPTConfig as CPTConfig
    from .methods.full_copy import TrainableTokensConfig as TrainableTokensConfig
    from .methods.ia3 import IA3Config as IA3Config
    from .methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from .methods.loha import LoHaConfig as LoHaConfig
    from .methods.lora import LoraConfig as LoraConfig
    from .methods.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from .methods.oft import OFTConfig as OFTConfig
    from .methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .methods.peft_types import PeftType as PeftType
    from .methods.peft_types import TaskType as TaskType
    from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.vera import VeraConfig as VeraConfig
    from .model.auto import AutoPeftModel as AutoPeftModel
    from .model.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .model.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .model.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .model.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .model.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .model.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .model.peft_model import PeftModel as PeftModel
    from .model.peft_model import get_peft_model as get_peft_model
    from .model.peft_model import inject_adapter_in_model as inject_adapter_in_model
    from .model.status import get_layer_status as get_layer_status
    from .model.status import get_model_status as get_model_status
    from .planning import plan as plan
    from .training.findings import WatchError as WatchError
    from .training.findings import WatchWarning as WatchWarning
    from .training.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .training.watch import watch as watch


__version__ = "0.1.0"

_HOMES = {
    "veneer.checks.verify": ("verify",),
    "veneer.export.dense": (
        "DenseReport",
        "export_dense",
    ),
    "veneer.export.to_lora": (
        "convert_to_lora",
        "save_as_lora",
    ),
    "veneer.files.certificate": (
        "Certificate",
        "CertificateWarning",
    ),
    "veneer.files.state_dict": (
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_peft_model_state_dict",
    ),
    "veneer.injection.router": (
        "Average",
        "Parallel",
    ),
    "veneer.interop.trainer": ("WatchCallback",),
    "veneer.io.fingerprint": ("BaseMismatchWarning",),
    "veneer.lifecycle.load_report": ("AdapterLoadError",),
    "veneer.methods.base": ("PeftConfig",),
    "veneer.methods.peft_types": (
        "PeftType",
        "TaskType",
    ),
    "veneer.model.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "veneer.model.peft_model": (
        "PeftModel",
        "get_peft_model",
        "inject_adapter_in_model",
    ),
    "veneer.model.status": (
        "get_layer_status",
        "get_model_status",
    ),
    "veneer.planning": ("plan",),
    "veneer.training.findings": (
        "WatchError",
        "WatchWarning",
    ),
    "veneer.training.kbit": ("prepare_model_for_kbit_training",),
    "veneer.training.watch": ("watch",),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}


def _configs() -> dict[str, type]:
    """Config classes of the registered methods, by class name."""
    registry = importlib.import_module("veneer.methods.registry").METHODS
    return {cls.__name__: cls for cls in registry.values()}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home = importlib.import_module(_NAMES[name])
        found = getattr(home, name)
    elif name == "__all__":
        found = sorted([*_NAMES, *_configs()])
    elif name.endswith("Config") and name in (configs := _configs()):
        found = configs[name]
    else:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_configs()])
