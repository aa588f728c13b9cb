"""One loaded model and its adapters, to try prompts on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

from ..io import locate as io_locate
from ..io import safe_read
from ..recipes.errors import InputError, user_input
from .folder import LORA, Folder


class Talk:
    """Keeps the base model between questions; adapters are added to it and switched, never loaded twice.

    Attributes:
        name: the base model that is loaded, or "".
        loads: how often a base model was loaded.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.name = ""
        self.loads = 0
        self.base: Any = None
        self.tokenizer: Any = None
        self.model: Any = None  # with adapters, once there is one
        self.known: dict[str, tuple[float, str]] = {}  # run -> when its file was written, and its name on the model

    def base_of(self, run: str) -> str:
        """What the page calls the base model of an adapter, or "" where it cannot tell."""
        path = self.folder.inside(run) / io_locate.CONFIG_NAME
        try:
            said = str(safe_read.json_object(path).get("base_model_name_or_path") or "")
        except (OSError, ValueError):
            return ""
        models = self.folder.models
        if models is not None and said.startswith(f"{models}/"):
            said = said.removeprefix(f"{models}/")
        try:
            self.folder.model(said)
        except InputError:
            return ""
        return said

    def load(self, name: str) -> None:
        """See that a base model is loaded, and its tokenizer.

        Raises:
            InputError: there is none, or it writes no text.
        """
        from transformers import AutoConfig

        from ..recipes.models import find_model, load_tokenizer
        from ..recipes.tasks import TASKS

        if name == self.name:
            return
        where = self.folder.model(name)
        with user_input():
            config = AutoConfig.from_pretrained(find_model(where))
            writes = str((getattr(config, "architectures", None) or [""])[0])
            if not writes.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
                raise InputError(
                    f"{name} is a {writes or config.model_type}, which writes no text; use `veneer generate`"
                )
            task = "seq2seq-lm" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
            self.name, self.base, self.model, self.known = "", None, None, {}  # the old one's memory first
            self.base, self.tokenizer = TASKS[task].load_model(where).eval(), load_tokenizer(where)
        self.name = name
        self.loads += 1

    def adapter(self, run: str) -> str:
        """See that a run's adapter is on the model; its name there."""
        import veneer

        path = self.folder.inside(run)
        weights = path / io_locate.WEIGHTS_NAME
        if not weights.is_file():
            what = "an adapter of diffusers" if (path / LORA).is_file() else "no adapter"
            raise InputError(f"{run!r} holds {what}; only adapters of text models can be tried here")
        written = weights.stat().st_mtime
        if run in self.known and self.known[run][0] == written:
            return self.known[run][1]
        name = f"run{len(self.known)}-{int(written)}"
        with user_input():
            if self.model is None:
                self.model = veneer.PeftModel.from_pretrained(self.base, path, adapter_name=name)
            else:
                self.model.load_adapter(path, name)
        if run in self.known:
            self.model.delete_adapter(self.known[run][1])
        self.known[run] = written, name
        return name

    def answer(
        self, model: str, runs: Sequence[str], prompt: str, tokens: int, temperature: float, chat: bool, seed: int = 0
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """What the base model says, and what it says with each adapter; and what is to be warned of.

        Raises:
            InputError: no prompt, no such model or adapter, or they do not go together.
        """
        import torch

        from ..recipes.tasks.base import complete_prompts
        from ..recipes.tasks.text import prompt_text

        if not prompt.strip():
            raise InputError("the prompt is empty; write what the model is to go on from")
        with self.lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.load(model)
            names = [(run, self.adapter(run)) for run in runs]
            options = {"do_sample": True, "temperature": temperature} if temperature else {}
            text = prompt_text(chat, prompt, self.tokenizer)

            def say() -> str:
                torch.manual_seed(seed)
                return complete_prompts(self.base, self.tokenizer, [text], int(tokens), **options)[0]

            with user_input():
                if self.model is None:
                    return [("base model", say())], []
                with self.model.disable_adapter():
                    answers = [("base model", say())]
                for run, name in names:
                    self.model.set_adapter(name)
                    answers.append((run, say()))
        told = [
            str(w.message) for w in caught if issubclass(w.category, UserWarning) and "veneer" in (w.filename or "")
        ]
        return answers, told
