"""What `veneer train` can train a model for: one entry a task."""

from .base import Task
from .images import ImageClassification
from .speech import SpeechRecognition
from .text import CausalLM, Classification, Seq2SeqLM
from .tokens import QuestionAnswering, TokenClassification

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        CausalLM(),
        Seq2SeqLM(),
        Classification(),
        TokenClassification(),
        QuestionAnswering(),
        ImageClassification(),
        SpeechRecognition(),
    )
}

__all__ = ["TASKS", "Task"]
