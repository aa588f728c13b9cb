"""gpt-oss' experts in mxfp4 with a gradient to their input, and with adapters.

transformers' kernel has no backward, and its output, cut off the graph, would leave the residual stream alone to carry
the gradient: wrong, and without an error. So if a gradient is needed, or weights have adapters, transformers' own
forward of the experts that are not quantized runs on them, and each expert's weight is dequantized for its product, and
again in the backward. On a CPU, which has no such kernel, it always does.

This module imports transformers; only a model that holds such layers leads here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import mxfp4
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from .base import Backend

EAGER = inspect.unwrap(GptOssExperts.forward)  # expert by expert, whatever the config selects


class Mxfp4GptOssExperts(mxfp4.Mxfp4GptOssExperts):
    """The experts; the name is that of transformers' class, by which its _no_split_modules list works."""

    _veneer_backend: Backend  # set with the class
    _veneer_projections: tuple[str, ...]
    _is_hooked = True  # the block then calls its router and these experts, each by itself, and no kernel of both

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        """Tokens (n, hidden), their experts (n, k) and the weights of these (n, k) -> (n, hidden)."""
        backend, projections = self._veneer_backend, self._veneer_projections
        adapted = {p: self._parameters[p].mT for p in projections if p in self._parameters}  # (experts, in, out)
        trains = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if not adapted and not trains and hidden_states.device.type != "cpu":
            return super().forward(hidden_states, top_k_index, top_k_weights)
        weights = {p: adapted[p] if p in adapted else backend.used(self, p).mT for p in projections}
        biases = {f"{p}_bias": getattr(self, f"{p}_bias") for p in projections}
        plain = SimpleNamespace(num_experts=self.num_experts, alpha=self.alpha, limit=self.limit, **weights, **biases)
        plain._apply_gate = partial(GptOssExperts._apply_gate, plain)
        x = hidden_states.to(backend.dtype(self, "down_proj"))
        return EAGER(plain, x, top_k_index, top_k_weights).to(hidden_states.dtype)


def plain_experts(module: Any, config: Any, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Transformers' experts that are not quantized, with `values`, (experts, out, in) each, in place of `module`."""
    with torch.device("meta"):
        made: Any = GptOssExperts(config)
    for name, value in values.items():
        bias = getattr(module, f"{name}_bias").detach().to(dtype, copy=True)
        made._parameters[name] = nn.Parameter(value.detach().mT.contiguous(), requires_grad=False)
        made._parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
    made._is_hooked = True  # in a block of quantized experts: see above
    plain: nn.Module = made.train(module.training)
    return plain
