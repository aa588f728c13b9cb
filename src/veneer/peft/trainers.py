"""What transformers' Trainer and TRL expect of `add_adapter` and `load_adapter`, beyond what Veneer's own do.

- A Trainer that resumes, or goes back to its best checkpoint, loads an adapter under the name that it has: the file's
  values go into the adapter that is there, in place, so that the optimizer keeps its parameters.
- TRL (DPO, KTO, GRPO, RLOO) makes a policy that was trained before its own reference: it adds an adapter "ref" with the
  live config of "default", then copies values between parameters by name, expecting ".default." in the names. Veneer's
  are called `lora_A:default`, so nothing would be copied, and the reference would silently be the base model. The copy
  is made when that adapter is added.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from .. import codec
from ..method import Method
from ..model import PeftModel
from ..runtime import LoadReport

POLICY, REFERENCE = "default", "ref"
PLAIN: dict[str, Any] = {name: vars(PeftModel)[name] for name in ("add_adapter", "load_adapter")}
HUB = ("subfolder", "revision", "token", "cache_dir")


@wraps(PLAIN["add_adapter"])
def add_adapter(self: PeftModel, adapter_name: str, peft_config: Method, *args: Any, **kwargs: Any) -> None:
    copied = adapter_name == REFERENCE and peft_config is self.peft_config.get(POLICY)
    PLAIN["add_adapter"](self, adapter_name, peft_config, *args, **kwargs)
    if copied:
        values = codec.get_peft_model_state_dict(self, adapter_name=POLICY)
        codec.set_peft_model_state_dict(self, values, adapter_name=REFERENCE)
        self.set_requires_grad(REFERENCE, False)


@wraps(PLAIN["load_adapter"])
def load_adapter(
    self: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    *args: Any,
    **kwargs: Any,
) -> LoadReport:
    if adapter_name not in self.peft_config:
        report: LoadReport = PLAIN["load_adapter"](self, model_id, adapter_name, is_trainable, *args, **kwargs)
        return report
    values = codec.load_weights(model_id, **{k: v for k, v in kwargs.items() if k in HUB})
    report = codec.set_peft_model_state_dict(self, values, adapter_name, strict=kwargs.get("strict", True))
    if not is_trainable:
        self.eval()
    return report


def show() -> None:
    """Let models take both, while Veneer stands in."""
    PeftModel.add_adapter, PeftModel.load_adapter = add_adapter, load_adapter  # type: ignore[method-assign]


def hide() -> None:
    """Go back to Veneer's own."""
    for name, function in PLAIN.items():
        setattr(PeftModel, name, function)
