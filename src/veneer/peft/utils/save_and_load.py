"""peft.utils.save_and_load."""

from ...files.state_dict import get_peft_model_state_dict as get_peft_model_state_dict
from ...files.state_dict import load_peft_weights as load_peft_weights
from ..models import set_peft_model_state_dict as set_peft_model_state_dict
