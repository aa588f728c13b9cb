"""peft.tuners.lora.model."""

from ..tuners_utils import LoraModel as LoraModel
