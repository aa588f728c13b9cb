"""peft.utils.peft_types."""

from ...methods.peft_types import PeftType as PeftType
from ...methods.peft_types import TaskType as TaskType
