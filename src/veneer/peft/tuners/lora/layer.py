"""peft.tuners.lora.layer: adapted layers by the kind that they are."""

from torch import nn

from ..tuners_utils import layer_of

LoraLayer = layer_of("LoraLayer", "LORA")
Linear = layer_of("Linear", "LORA", nn.Linear)
Embedding = layer_of("Embedding", "LORA", nn.Embedding)
Conv1d = layer_of("Conv1d", "LORA", nn.Conv1d)
Conv2d = layer_of("Conv2d", "LORA", nn.Conv2d)
Conv3d = layer_of("Conv3d", "LORA", nn.Conv3d)
MultiheadAttention = layer_of("MultiheadAttention", "LORA", nn.MultiheadAttention)
