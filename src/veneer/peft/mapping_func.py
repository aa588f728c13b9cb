"""peft.mapping_func."""

from ..model.peft_model import get_peft_model as get_peft_model
