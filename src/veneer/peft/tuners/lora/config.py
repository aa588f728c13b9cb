"""peft.tuners.lora.config."""

from ....methods.lora import LoraConfig as LoraConfig
