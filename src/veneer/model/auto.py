"""AutoPeftModel classes: base model and adapter from one folder."""

from __future__ import annotations

import os
from typing import Any

from ..methods.base import Method, PeftConfig
from .peft_model import PeftModel


class _AutoPeftModel:
    """Loads the base model an adapter names, then the adapter. Subclasses fix transformers' auto class."""

    target: str | None = None

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Method | None = None,
        revision: str | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base model and adapter; keyword arguments other than the hub's go to the base model.

        Raises:
            ValueError: the config names no base model, or no class to load it with.
        """
        import transformers

        hub = {k: kwargs.pop(k) for k in ("subfolder", "token", "cache_dir") if k in kwargs}
        found = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        if not found.base_model_name_or_path:
            raise ValueError(f"{pretrained_model_name_or_path!s}: its config names no base_model_name_or_path")
        target = cls.target or AUTO_CLASSES.get(found.task_type or "")
        if target is not None:
            loader = getattr(transformers, target)
        elif found.auto_mapping:
            module, name = found.auto_mapping["parent_library"], found.auto_mapping["base_model_class"]
            if not module.startswith("transformers."):
                raise ValueError(
                    f"{pretrained_model_name_or_path!s}: its base class is {module}.{name}; load that model yourself "
                    "and use PeftModel.from_pretrained(model, adapter)"
                )
            loader = getattr(transformers, name)
        else:
            raise ValueError(
                f"{pretrained_model_name_or_path!s}: its config has no task_type; use the class of the task, such as "
                "AutoPeftModelForCausalLM"
            )
        base = loader.from_pretrained(found.base_model_name_or_path, revision=found.revision or "main", **kwargs)
        return PeftModel.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            found,
            revision=revision,
            strict=strict,
            **hub,
        )


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel(_AutoPeftModel):
    """For any task; the adapter's config says which."""


class AutoPeftModelForCausalLM(_AutoPeftModel):
    target = AUTO_CLASSES["CAUSAL_LM"]


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    target = AUTO_CLASSES["SEQ_2_SEQ_LM"]


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    target = AUTO_CLASSES["SEQ_CLS"]


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    target = AUTO_CLASSES["TOKEN_CLS"]


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    target = AUTO_CLASSES["QUESTION_ANS"]


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    target = AUTO_CLASSES["FEATURE_EXTRACTION"]
