"""The frozen copy of an adapter that TRL trains against.

Where a policy has been trained before, TRL (DPO, KTO, GRPO, RLOO) makes the adapter its own reference: it adds one named
"ref" with the very config of "default", and then copies the values between parameters by their names, of which it expects
that they hold ".default.". Veneer's parameters lie on the layer and are called `lora_A:default`, so nothing would be
copied, and the reference would silently be the base model. The copy is made here, when that adapter is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..codec import get_peft_model_state_dict, set_peft_model_state_dict

if TYPE_CHECKING:
    from ..method import Method
    from ..model import PeftModel

POLICY, REFERENCE = "default", "ref"


def is_reference(model: PeftModel, adapter_name: str, peft_config: Method) -> bool:
    """Whether an adapter that is about to be added is TRL's reference: its name, and the live config of the policy."""
    return adapter_name == REFERENCE and peft_config is model.peft_config.get(POLICY)


def copy_policy(model: PeftModel) -> None:
    """Give the reference the policy's values, and freeze it."""
    values = get_peft_model_state_dict(model, adapter_name=POLICY)
    set_peft_model_state_dict(model, values, adapter_name=REFERENCE)
    model.set_requires_grad(REFERENCE, False)
