"""peft.tuners.ia3.layer."""

from torch import nn

from ..tuners_utils import layer_of

IA3Layer = layer_of("IA3Layer", "IA3")
Linear = layer_of("Linear", "IA3", nn.Linear)
