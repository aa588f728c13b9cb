"""What TRL expects of `add_adapter`, beyond what Veneer's own does.

TRL (DPO, KTO, GRPO, RLOO) makes a policy that was trained before its own reference: it adds an adapter "ref" with the live
config of "default", then copies values between parameters by name, expecting ".default." in the names. Veneer's are called
`lora_A:default`, so nothing would be copied, and the reference would silently be the base model. The copy is made when that
adapter is added.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..files import state_dict
from ..methods.base import Method
from ..model.peft_model import PeftModel

POLICY, REFERENCE = "default", "ref"
PLAIN = PeftModel.add_adapter


@wraps(PLAIN)
def add_adapter(self: PeftModel, adapter_name: str, peft_config: Method, *args: Any, **kwargs: Any) -> None:
    copied = adapter_name == REFERENCE and peft_config is self.peft_config.get(POLICY)
    PLAIN(self, adapter_name, peft_config, *args, **kwargs)
    if copied:
        values = state_dict.get_peft_model_state_dict(self, adapter_name=POLICY)
        state_dict.set_peft_model_state_dict(self, values, adapter_name=REFERENCE)
        self.set_requires_grad(REFERENCE, False)


def show_view() -> None:
    """Let models take it, while Veneer stands in."""
    PeftModel.add_adapter = add_adapter  # type: ignore[method-assign, assignment]


def hide_view() -> None:
    """Go back to Veneer's own."""
    PeftModel.add_adapter = PLAIN  # type: ignore[method-assign]
