"""peft.tuners.ln_tuning.layer."""

from torch import nn

from ..tuners_utils import layer_of

LNTuningLayer = layer_of("LNTuningLayer", "LN_TUNING")
Linear = layer_of("Linear", "LN_TUNING", nn.Linear)
