"""peft.tuners.oft.layer."""

from torch import nn

from ..tuners_utils import layer_of

OFTLayer = layer_of("OFTLayer", "OFT")
Linear = layer_of("Linear", "OFT", nn.Linear)
