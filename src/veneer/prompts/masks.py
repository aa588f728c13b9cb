"""Attention masks extended by virtual positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .virtual_tokens import VirtualTokens


MASKS = (torch.bool, torch.int32, torch.int64, torch.uint8)


def mask_like(seen: Tensor, mask: Tensor) -> Tensor:
    """A bool mask in the dtype of `mask`: unchanged, or as a bias of attention scores."""
    if mask.dtype in MASKS:
        return seen.to(mask.dtype)
    return torch.where(seen, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)


def extend_cross(call: dict[str, Any], front: VirtualTokens) -> None:
    """Let a decoder see the encoder's virtual tokens, of which its mask knows nothing."""
    mask, hidden = call.get("encoder_attention_mask"), call["encoder_hidden_states"]
    front = front.rows(hidden.shape[0])
    if mask is None and front.counts is None:
        return
    shown = front.mask(hidden.shape[0], hidden.device)
    if mask is None:
        mask = torch.ones(hidden.shape[0], hidden.shape[1] - shown.shape[1], dtype=torch.long, device=hidden.device)
    if mask.shape[-1] == hidden.shape[1]:
        return  # extended already, by a caller that knows
    call["encoder_attention_mask"] = torch.cat([shown.to(mask.dtype), mask], 1)


def refuse_packed_kernels(call: Mapping[str, Any]) -> None:
    """Raise ValueError for sequences packed by their lengths, which leave no place for virtual tokens."""
    if call.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "soft prompts: sequences packed with cu_seq_lens_q leave no place for virtual tokens before each; pass "
            "position_ids that start again at each sequence, without an attention_mask, or do not pack"
        )
