"""peft.utils."""

from ...training.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .constants import CONFIG_NAME as CONFIG_NAME
from .constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND
from .constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from .constants import WEIGHTS_NAME as WEIGHTS_NAME
from .other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from .other import ModulesToSaveWrapper as ModulesToSaveWrapper
from .other import TrainableTokensWrapper as TrainableTokensWrapper
from .other import _freeze_adapter as _freeze_adapter
from .other import _get_submodules as _get_submodules
from .other import cast_mixed_precision_params as cast_mixed_precision_params
from .other import shift_tokens_right as shift_tokens_right
from .peft_types import PeftType as PeftType
from .peft_types import TaskType as TaskType
from .save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
from .save_and_load import load_peft_weights as load_peft_weights
from .save_and_load import set_peft_model_state_dict as set_peft_model_state_dict
