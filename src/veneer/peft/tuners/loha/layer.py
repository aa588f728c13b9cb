"""peft.tuners.loha.layer."""

from torch import nn

from ..tuners_utils import layer_of

LoHaLayer = layer_of("LoHaLayer", "LOHA")
Linear = layer_of("Linear", "LOHA", nn.Linear)
