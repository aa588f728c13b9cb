"""peft.tuners.vera.layer."""

from torch import nn

from ..tuners_utils import layer_of

VeraLayer = layer_of("VeraLayer", "VERA")
Linear = layer_of("Linear", "VERA", nn.Linear)
