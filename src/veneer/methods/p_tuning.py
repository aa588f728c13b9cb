"""P-Tuning: embeddings of virtual tokens that a small network computes while it is trained.

References:
    Liu et al. 2021, arxiv.org/abs/2103.10385
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.site import Site
from .checks import check_one_of, check_positive_int, check_probability
from .hooks import Tensors
from .prompt_learning import PROMPT, PromptLearningConfig
from .registry import method
from .tensors import Trained


@method("P_TUNING")
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-Tuning. Liu et al. 2021, arxiv.org/abs/2103.10385, eq. 5:  h = MLP(LSTM(e)), or MLP(e)

    The file holds the embeddings that the network computed. A loaded adapter has no network: it is a prompt, and
    `is_trainable=True` trains it as one.

    Args:
        num_virtual_tokens: virtual tokens in front of each sequence.
        encoder_reparameterization_type: "MLP", or "LSTM" for a bidirectional LSTM before the MLP.
        encoder_hidden_size: width inside the network; None for `token_dim`.
        encoder_num_layers: layers of the LSTM; the MLP always has its own.
        encoder_dropout: probability of dropping an entry between the layers of the LSTM while training.
        token_dim: width of a virtual token; None for that of the model's embeddings.
        num_transformer_submodules: stacks for which the table has rows; None for 2 with task SEQ_2_SEQ_LM, else 1.
        virtual_tokens_in: where an encoder-decoder has them: "encoder", "decoder" or "both"; None for the encoder, as in
            peft, which does not know this field.
        num_attention_heads: kept for peft's files; has no effect.
        num_layers: kept for peft's files; has no effect.
        modules_to_save: modules trained as full copies and saved with the adapter.
    """

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    virtual_tokens_in: str | None = None

    recipe = {"learning_rate": 5e-3, "warmup": 20}
    tensors = {
        "embedding": PROMPT,
        "lstm_head.*": Trained(shared="first"),
        "mlp_head.*": Trained(shared="first"),
    }
    own_fields = frozenset({"virtual_tokens_in"})

    def check(self) -> None:
        super().check()
        self.check_where(self.virtual_tokens_in)
        how = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = str(getattr(how, "value", how))
        check_one_of(self, ("MLP", "LSTM"), encoder_reparameterization_type=self.encoder_reparameterization_type)
        check_positive_int(self, encoder_num_layers=self.encoder_num_layers)
        if self.encoder_hidden_size is not None:
            check_positive_int(self, encoder_hidden_size=self.encoder_hidden_size)
        check_probability(self, encoder_dropout=self.encoder_dropout)

    def prepare(self, model: nn.Module) -> Self:
        prepared = super().prepare(model)
        hidden = self.encoder_hidden_size or prepared.token_dim
        return prepared.replace(encoder_hidden_size=hidden)

    def init(self, site: Site) -> dict[str, Tensor]:
        width, hidden = self.token_dim or site.fan_out, self.encoder_hidden_size or site.fan_out
        p = {"embedding": site.normal(self.total_virtual_tokens, width)}  # (T, width)
        if self.encoder_reparameterization_type == "LSTM":
            network = self.lstm(width)
            p |= {f"lstm_head.{k}": site.uniform(*v.shape, bound=hidden**-0.5) for k, v in network.named_parameters()}
            sizes = [(hidden * 2, hidden * 2), (width, hidden * 2)]
        else:
            sizes = [(hidden, width), (hidden, hidden), (width, hidden)]
        for i, (out, into) in enumerate(sizes):  # as nn.Linear starts, in an nn.Sequential with an activation between
            p[f"mlp_head.{2 * i}.weight"] = site.kaiming_uniform(out, into)
            p[f"mlp_head.{2 * i}.bias"] = site.uniform(out, bound=into**-0.5)
        return p

    def loaded(self, site: Site) -> dict[str, Tensor]:
        return {"embedding": site.empty(self.total_virtual_tokens, self.token_dim or site.fan_out)}  # (T, width)

    def exported(self, p: Tensors, site: Site) -> dict[str, Tensor] | None:
        return {"embedding": self.table(p, training=False)} if len(p) > 1 else None

    def prompt(self, p: Tensors, site: Site, tasks: Tensor | None) -> Tensor | None:
        return self.part(self.table(p, training=site.owner.training), site, self.virtual_tokens_in)  # (T, width)

    def table(self, p: Tensors, *, training: bool) -> Tensor:
        """Every row that the network computes, (total, width)."""
        x = p["embedding"]  # (total, width)
        recurrent = {k.removeprefix("lstm_head."): v for k, v in p.items() if k.startswith("lstm_head.")}
        if recurrent:
            network = self.lstm(x.shape[1]).train(training)
            x = torch.func.functional_call(network, recurrent, (x[None],))[0][0]  # (total, 2 hidden)
        count = sum(k.startswith("mlp_head.") for k in p) // 2
        for i in range(count):
            x = F.linear(x, p[f"mlp_head.{2 * i}.weight"], p[f"mlp_head.{2 * i}.bias"])
            x = torch.relu(x) if i + 1 < count else x
        return x

    def lstm(self, width: int) -> nn.LSTM:
        """The network without its weights."""
        return nn.LSTM(
            width,
            self.encoder_hidden_size or width,
            self.encoder_num_layers,
            dropout=self.encoder_dropout,
            bidirectional=True,
            batch_first=True,
            device="meta",
        )
