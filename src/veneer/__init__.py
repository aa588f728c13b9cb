"""Veneer: fine-tune large pretrained models by training a thin layer on frozen weights.

Public names are peft's. Importing the package imports torch and nothing heavy; names are resolved on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ finds, for type checkers and editors
    from .codec import get_peft_model_state_dict as get_peft_model_state_dict
    from .codec import load_peft_weights as load_peft_weights
    from .codec import set_peft_model_state_dict as set_peft_model_state_dict
    from .convert import convert_to_lora as convert_to_lora
    from .convert import save_as_lora as save_as_lora
    from .dense import DenseReport as DenseReport
    from .dense import export_dense as export_dense
    from .fingerprint import BaseMismatchWarning as BaseMismatchWarning
    from .interop.trainer import WatchCallback as WatchCallback
    from .kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .method import PeftConfig as PeftConfig
    from .method import PeftType as PeftType
    from .method import TaskType as TaskType
    from .methods.adapter_fusion import AdapterFusionConfig as AdapterFusionConfig
    from .methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
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
    from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.vera import VeraConfig as VeraConfig
    from .model import AutoPeftModel as AutoPeftModel
    from .model import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .model import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .model import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .model import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .model import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .model import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .model import PeftModel as PeftModel
    from .model import get_layer_status as get_layer_status
    from .model import get_model_status as get_model_status
    from .model import get_peft_model as get_peft_model
    from .model import inject_adapter_in_model as inject_adapter_in_model
    from .planning import plan as plan
    from .router import Average as Average
    from .router import Parallel as Parallel
    from .runtime import AdapterLoadError as AdapterLoadError
    from .verification import Certificate as Certificate
    from .verification import CertificateWarning as CertificateWarning
    from .verification import verify as verify
    from .watchdog import WatchError as WatchError
    from .watchdog import WatchWarning as WatchWarning
    from .watchdog import watch as watch


__version__ = "0.1.0"

_HOMES = {
    "veneer.method": ("PeftConfig", "PeftType", "TaskType"),
    "veneer.model": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
        "PeftModel",
        "get_layer_status",
        "get_model_status",
        "get_peft_model",
        "inject_adapter_in_model",
    ),
    "veneer.codec": ("get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"),
    "veneer.convert": ("convert_to_lora", "save_as_lora"),
    "veneer.dense": ("DenseReport", "export_dense"),
    "veneer.planning": ("plan",),
    "veneer.router": ("Average", "Parallel"),
    "veneer.kbit": ("prepare_model_for_kbit_training",),
    "veneer.runtime": ("AdapterLoadError",),
    "veneer.verification": ("Certificate", "CertificateWarning", "verify"),
    "veneer.fingerprint": ("BaseMismatchWarning",),
    "veneer.interop.trainer": ("WatchCallback",),
    "veneer.watchdog": ("WatchError", "WatchWarning", "watch"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}


def _configs() -> dict[str, type]:
    """Config classes of the registered methods, by class name."""
    registry = importlib.import_module("veneer.method").METHODS
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
