"""peft.tuners: the configs and models of the methods that are there."""

from ...methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from ...methods.full_copy import TrainableTokensConfig as TrainableTokensConfig
from ...methods.ia3 import IA3Config as IA3Config
from ...methods.ln_tuning import LNTuningConfig as LNTuningConfig
from ...methods.loha import LoHaConfig as LoHaConfig
from ...methods.lora import LoraConfig as LoraConfig
from ...methods.oft import OFTConfig as OFTConfig
from ...methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from ...methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from ...methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from ...methods.vera import VeraConfig as VeraConfig
from .tuners_utils import AdaptionPromptModel as AdaptionPromptModel
from .tuners_utils import IA3Model as IA3Model
from .tuners_utils import LNTuningModel as LNTuningModel
from .tuners_utils import LoHaModel as LoHaModel
from .tuners_utils import LoraModel as LoraModel
from .tuners_utils import OFTModel as OFTModel
from .tuners_utils import TrainableTokensModel as TrainableTokensModel
from .tuners_utils import VeraModel as VeraModel
