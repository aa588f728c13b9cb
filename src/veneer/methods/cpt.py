"""Context-aware prompt tuning: embeddings of in-context examples, moved within a small ball, under a weighted loss.

References:
    Blau et al. 2024, arxiv.org/abs/2410.17222
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.site import Site
from .checks import check_one_of
from .hooks import Tensors
from .peft_types import TaskType
from .prompt_learning import PromptLearningConfig
from .prompt_tuning import word_rows
from .registry import method
from .tensors import Constant, Trained

SMALLEST = 1e-10  # how far a token that is not trained may move, as in peft


@method("CPT")
@dataclass
class CPTConfig(PromptLearningConfig):
    """CPT. Blau et al. 2024, arxiv.org/abs/2410.17222, section 3:  P = E(x) + d,  ||d_i|| <= eps_i

    The model's forward takes `input_type_mask` (batch, tokens), the kinds of the caller's tokens, for the loss.

    Args:
        cpt_token_ids: tokens of the in-context examples that stand in front of each sequence.
        cpt_mask: which of them the model attends to; all must be 1.
        cpt_tokens_type_mask: the kind of each, counted in fours from one example to the next: remainder 1 for the input's
            template, 2 for input, 3 for the output's template, 0 for the label (which is not moved).
        opt_weighted_loss_type: "decay" weighs labels down the further back their example is, "none" does not.
        opt_loss_decay_factor: factor from one example to the one before.
        opt_projection_epsilon: how far an input token may move, for a width of 2048.
        opt_projection_format_epsilon: how far a template's token may move, for a width of 2048.
        tokenizer_name_or_path: kept for peft's files; has no effect.
        num_virtual_tokens: set to the number of `cpt_token_ids`.
        token_dim: width of a virtual token; None for that of the model's embeddings.
        num_transformer_submodules: kept for peft's files; 1.
        num_attention_heads: kept for peft's files; has no effect.
        num_layers: kept for peft's files; has no effect.
        modules_to_save: modules trained as full copies and saved with the adapter.

    Raises:
        ValueError: lists of different lengths, or another task than CAUSAL_LM.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    tensors = {
        "embedding": Constant("prompt_embeddings", shared="first", saved="once"),
        "delta": Trained(shared="first"),
    }
    extra_inputs = ("input_type_mask",)

    def check(self) -> None:
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ValueError(f"CPTConfig(task_type={str(self.task_type)!r}): must be 'CAUSAL_LM'")
        self.task_type = TaskType.CAUSAL_LM
        self.cpt_token_ids = list(self.cpt_token_ids) if self.cpt_token_ids is not None else [0]
        n = len(self.cpt_token_ids)
        self.cpt_mask = list(self.cpt_mask) if self.cpt_mask is not None else [1] * n
        self.cpt_tokens_type_mask = (
            list(self.cpt_tokens_type_mask) if self.cpt_tokens_type_mask is not None else [1] * n
        )
        lengths = {n, len(self.cpt_mask), len(self.cpt_tokens_type_mask)}
        if lengths != {n} or not n:
            raise ValueError(
                f"CPTConfig: cpt_token_ids ({n}), cpt_mask ({len(self.cpt_mask)}) and cpt_tokens_type_mask "
                f"({len(self.cpt_tokens_type_mask)}) must have the same length, 1 or more"
            )
        if any(m != 1 for m in self.cpt_mask):
            raise ValueError(
                "CPTConfig(cpt_mask=...): must be all 1, as tokens in front of a sequence need no padding; leave out the "
                "tokens that are not to be attended to"
            )
        check_one_of(self, ("none", "decay"), opt_weighted_loss_type=self.opt_weighted_loss_type)
        self.num_virtual_tokens, self.num_transformer_submodules = n, 1
        super().check()

    def loaded(self, site: Site) -> dict[str, Tensor]:
        shape = (self.num_virtual_tokens, self.token_dim or site.fan_out)  # (T, width)
        return {"embedding": site.empty(*shape), "delta": site.zeros(*shape)}

    def init(self, site: Site) -> dict[str, Tensor]:
        p = self.loaded(site)
        ids = torch.tensor(self.cpt_token_ids)
        return p | {"embedding": site.computed(tuple(p["embedding"].shape), lambda: word_rows(site, ids))}

    def kinds(self, device: torch.device) -> Tensor:
        return torch.tensor(self.cpt_tokens_type_mask, device=device)  # (T,)

    def moved(self, p: Tensors) -> Tensor:
        """The part of `delta` within each token's ball, (T, width)."""
        delta = p["delta"]
        kinds = self.kinds(delta.device)
        scale = (delta.shape[1] / 2048) ** 0.5
        eps = torch.full(kinds.shape, SMALLEST, device=delta.device)  # (T,)
        eps = torch.where((kinds > 0) & (kinds % 4 % 2 == 1), self.opt_projection_format_epsilon * scale, eps)
        eps = torch.where((kinds > 0) & (kinds % 4 == 2), self.opt_projection_epsilon * scale, eps)
        norm = delta.norm(dim=1)  # (T,)
        # The margin keeps a token that was pulled back before from drifting with every rounding.
        factor = torch.where(norm <= eps * (1 + 1e-5), torch.ones_like(norm), eps / norm.clamp_min(1e-30))
        return delta * factor[:, None]

    def prompt(self, p: Tensors, site: Site, tasks: Tensor | None) -> Tensor | None:
        # Projected gradient descent: the value is within the balls, where `constrain` keeps it, and the gradient passes.
        delta = p["delta"] - p["delta"].detach() + self.moved(p).detach()
        trained = (self.kinds(delta.device) % 4 != 0)[:, None]  # labels stay where they are
        return p["embedding"] + torch.where(trained, delta, delta.detach())

    def constrain(self, p: Tensors, site: Site) -> dict[str, Tensor]:
        return {"delta": self.moved(p)}

    def exported(self, p: Tensors, site: Site) -> dict[str, Tensor]:
        return {"embedding": p["embedding"] + self.moved(p)}

    def objective(self, logits: Tensor, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        batch, device = labels.shape[0], labels.device
        own = self.kinds(device).expand(batch, -1)  # (batch, T)
        given = inputs.get("input_type_mask")
        theirs = torch.full_like(labels, 4) if given is None else given.to(labels)  # (batch, tokens)
        before = (own.max() + 3) // 4 * 4  # theirs go on after the last example, whole or not
        kinds = torch.cat([own, torch.where(theirs > 0, theirs + before, theirs)], 1)  # (batch, T + tokens)
        ids = torch.tensor(self.cpt_token_ids, device=device).expand(batch, -1)
        is_label = (kinds > 0) & (kinds % 4 == 0)
        wanted = torch.where(is_label, torch.cat([ids, labels], 1), -100)[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="none")
        weights = self.weights(kinds[:, 1:]) if self.opt_weighted_loss_type == "decay" else torch.ones_like(wanted)
        scored = wanted.flatten() != -100
        return (losses * weights.flatten())[scored].mean()

    def weights(self, kinds: Tensor) -> Tensor:
        """Factor^k for the labels of the k-th example from the end, 1 elsewhere; (batch, n)."""
        weights = torch.ones(kinds.shape, device=kinds.device)
        for row, weight in zip(kinds, weights, strict=True):
            labels = row[(row > 0) & (row % 4 == 0)].unique()  # sorted
            for k, kind in enumerate(labels.flip(0).tolist()):
                weight[row == kind] = self.opt_loss_decay_factor**k
        return weights
