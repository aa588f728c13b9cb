"""peft.tuners.ln_tuning."""

from ....methods.ln_tuning import LNTuningConfig as LNTuningConfig
from ..tuners_utils import LNTuningModel as LNTuningModel
from .layer import LNTuningLayer as LNTuningLayer
