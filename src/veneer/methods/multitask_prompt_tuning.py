"""Multitask prompt tuning: one prompt for all tasks, and a low-rank factor on it for each.

References:
    Wang et al. 2023, arxiv.org/abs/2303.02861
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..io.locate import read_tensors
from ..layers.site import Site
from .checks import check_one_of, check_positive_int
from .hooks import Tensors
from .prompt_learning import PROMPT
from .prompt_tuning import PromptTuningConfig
from .registry import method
from .tensors import Trained

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@method("MULTITASK_PROMPT_TUNING")
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning. Wang et al. 2023, arxiv.org/abs/2303.02861, eq. 1:  P_k = P * (u_k v_k^T)

    The forward and `generate` take `task_ids`, a tensor (batch,) with the task of each row; one task needs none.

    Args:
        num_virtual_tokens: virtual tokens in front of each sequence.
        num_tasks: tasks, each with a factor of its own.
        num_ranks: rank of a task's factor.
        prompt_tuning_init: "RANDOM" or "TEXT" as in prompt tuning; "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK" or
            "ONLY_SOURCE_SHARED" start from a trained adapter's file: from the mean of its tasks' factors, from one
            task's, or from its prompt alone.
        prompt_tuning_init_state_dict_path: that file, an adapter_model.safetensors or peft's older .bin.
        prompt_tuning_init_task: the task that "EXACT_SOURCE_TASK" takes.
        prompt_tuning_init_text: the text whose tokens the prompt starts from.
        tokenizer_name_or_path: tokenizer for that text, a hub id or folder.
        tokenizer_kwargs: arguments for loading the tokenizer.
        token_dim: width of a virtual token; None for that of the model's embeddings.
        num_transformer_submodules: stacks with virtual tokens of their own; None for 2, encoder and decoder, with task
            SEQ_2_SEQ_LM, else 1.
        virtual_tokens_in: where an encoder-decoder has them: "encoder", "decoder" or "both"; None for both where the table
            has rows for both, as in peft, which does not know this field.
        num_attention_heads: kept for peft's files; has no effect.
        num_layers: kept for peft's files; has no effect.
        modules_to_save: modules trained as full copies and saved with the adapter.

    Raises:
        ValueError: a source that cannot be read or does not fit; in the forward, task_ids missing or out of range.
    """

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    recipe = {"learning_rate": 1e-2, "warmup": 10}
    tensors = {
        "embedding": PROMPT,
        "cols": Trained("prefix_task_cols", shared="first", saved="once"),
        "rows": Trained("prefix_task_rows", shared="first", saved="once"),
    }

    def check_start(self) -> None:
        check_one_of(self, ("RANDOM", "TEXT", *SOURCES), prompt_tuning_init=self.prompt_tuning_init)
        check_positive_int(self, num_ranks=self.num_ranks, num_tasks=self.num_tasks)
        if self.prompt_tuning_init in SOURCES and not (self.prompt_tuning_init_state_dict_path or self.from_file):
            raise ValueError(
                f"MultitaskPromptTuningConfig(prompt_tuning_init={self.prompt_tuning_init!r}): needs "
                "prompt_tuning_init_state_dict_path, the file of a trained adapter"
            )

    def loaded(self, site: Site) -> dict[str, Tensor]:
        return super().loaded(site) | {
            "cols": site.empty(self.num_tasks, self.total_virtual_tokens, self.num_ranks),  # (tasks, T, rank)
            "rows": site.empty(self.num_tasks, self.num_ranks, self.token_dim or site.fan_out),  # (tasks, rank, width)
        }

    def init(self, site: Site) -> dict[str, Tensor]:
        shapes = {k: tuple(t.shape) for k, t in self.loaded(site).items()}
        p = super().init(site)
        p |= {k: site.normal(*shapes[k], std=0.02) for k in ("cols", "rows")}
        if self.prompt_tuning_init in SOURCES and not site.meta:
            found, names = self.source(), self.source_names
            for key, value in found.items():
                if tuple(value.shape) != shapes[key]:
                    raise ValueError(
                        f"{self.prompt_tuning_init_state_dict_path}: {names[key]} gives {tuple(value.shape)} with "
                        f"prompt_tuning_init={self.prompt_tuning_init!r}, and the config asks for {shapes[key]}; make "
                        "num_tasks 1 and num_virtual_tokens, num_ranks and token_dim the source's"
                    )
                p[key] = site.computed(shapes[key], lambda value=value: value)  # type: ignore[misc]
        return p

    @property
    def source_names(self) -> dict[str, str]:
        """Tensor -> its name in the file of a trained adapter."""
        return {key: str(one.name) for key, one in self.tensors.items()}

    def source(self) -> dict[str, Tensor]:
        """The trained tensors that this adapter starts from."""
        path = str(self.prompt_tuning_init_state_dict_path)
        found, names = read_tensors(path), self.source_names
        wanted = ["embedding"] if self.prompt_tuning_init == "ONLY_SOURCE_SHARED" else list(names)
        missing = [names[k] for k in wanted if names[k] not in found]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; give the file of a multitask prompt")
        p = {k: found[names[k]] for k in wanted}
        for key in ("cols", "rows"):
            if key not in p:
                continue
            if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                p[key] = p[key].mean(0, keepdim=True)
            elif not 0 <= self.prompt_tuning_init_task < p[key].shape[0]:
                raise ValueError(
                    f"MultitaskPromptTuningConfig(prompt_tuning_init_task={self.prompt_tuning_init_task}): {path} has tasks 0 "
                    f"to {p[key].shape[0] - 1}"
                )
            else:
                p[key] = p[key][self.prompt_tuning_init_task][None]
        return p

    def prompt(self, p: Tensors, site: Site, tasks: Tensor | None) -> Tensor | None:
        if tasks is None and self.num_tasks == 1:
            tasks = torch.zeros(1, dtype=torch.long)  # the only one there is
        if tasks is None:
            raise ValueError(
                "multitask prompt tuning: say each row's task with task_ids, a tensor (batch,), in the call or in generate"
            )
        if tasks.ndim != 1 or (
            not torch.compiler.is_compiling() and not bool(((tasks >= 0) & (tasks < self.num_tasks)).all())
        ):
            raise ValueError(f"task_ids={tasks.tolist()}: must be (batch,) numbers from 0 to {self.num_tasks - 1}")
        tasks = tasks.to(p["cols"].device)
        factor = p["cols"][tasks] @ p["rows"][tasks]  # (batch, T, width)
        table = p["embedding"] * factor  # (batch, T, width), eq. 1
        both = "both" if self.num_transformer_submodules == 2 else None
        return self.part(table, site, self.virtual_tokens_in or both)
