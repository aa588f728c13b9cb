"""peft.utils.peft_types."""

from ...method import PeftType as PeftType
from ...method import TaskType as TaskType
