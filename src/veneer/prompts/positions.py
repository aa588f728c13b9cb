"""Positions and masks of a stack's call, extended by virtual positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .masks import mask_like
from .stack_call import StackCall

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class PositionedCall(StackCall):
    """A call whose position_ids and attention_mask count the virtual positions."""

    def _extend_positions(self, runs: int, past: int | Tensor, inner: Cache | None) -> None:
        """Count the virtual positions in position_ids, which are made if the rows differ."""
        call, front = self.call, self.front
        given = call.get("position_ids")
        takes = "position_ids" in self.door.arguments
        if given is None and front.counts is not None:
            if not takes:
                raise ValueError(
                    f"{type(self.stack).__name__} takes no position_ids, so soft prompts of different lengths cannot "
                    "share a batch on it; give them the same num_virtual_tokens, or run the rows one adapter at a time"
                )
            given = self._token_positions(past)
        if given is None:
            return
        if inner is None and call.get("attention_mask") is None and self.door.causal:
            self._mask_packed_sequences(given)
        moved = given + front.offset(self.device)
        if runs:
            steps = front.prompt_positions(moved.shape[-2] if moved.ndim > 1 else 1, self.device).to(moved.dtype)
            steps = steps if self.door.table is None else steps + self.door.table.first
            moved = torch.cat([steps.expand(*moved.shape[:-1], -1) if moved.ndim > 1 else steps[0], moved], -1)
        call["position_ids"] = moved

    def _token_positions(self, past: int | Tensor) -> Tensor:
        """Positions of the real tokens as the model counts them, (1 or batch, tokens)."""
        mask, table = self.call.get("attention_mask"), self.door.table
        if table is not None and table.by_mask and isinstance(mask, Tensor) and mask.ndim == 2:
            counted: Tensor = (mask.long().cumsum(1) - 1).clamp_min(0) + table.first
            return counted[:, -self.tokens :]
        steps: Tensor = torch.arange(self.tokens, device=self.device) + past
        return steps[None] + (0 if table is None else table.first)

    def _mask_packed_sequences(self, positions: Tensor) -> None:
        """Several sequences in a row, told by positions that start again: each sees the virtual tokens and itself."""
        positions = positions.reshape(-1, positions.shape[-1])
        starts = positions[:, 1:] != positions[:, :-1] + 1  # (rows, tokens - 1)
        if not torch.compiler.is_compiling() and not bool(starts.any()):  # a graph has the mask in any case
            return
        number = nn.functional.pad(starts.long().cumsum(1), (1, 0))  # (rows, tokens)
        same = number[:, :, None] == number[:, None, :]  # (rows, tokens, tokens)
        causal = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=self.device).tril()
        self.call["attention_mask"] = self._in_mask_form((same & causal)[:, None].expand(self.batch, -1, -1, -1))

    def _in_mask_form(self, seen: Tensor) -> Tensor:
        """A bool mask (batch, 1, queries, keys) in the form that the attention implementation adds or reads."""
        how = getattr(getattr(self.stack, "config", None), "_attn_implementation", "eager")
        if how == "sdpa":
            return seen
        if how != "eager":
            raise ValueError(
                f"packed sequences with a soft prompt need a 4-D mask, which {how!r} attention does not take; load the "
                "model with attn_implementation='sdpa', or do not pack"
            )
        dtype = self._embedding_dtype()
        zero = torch.zeros((), dtype=dtype, device=seen.device)
        return torch.where(seen, zero, torch.finfo(dtype).min)

    def _extend_mask(self, runs: int, past: int | Tensor, inner: Cache | None) -> None:
        """Let the tokens attend to the virtual positions: 2-D masks, 4-D masks, one per layer kind, or none."""
        mask, front = self.call.get("attention_mask"), self.front
        shown = front.mask(self.batch, self.device)  # (batch, P + T)
        if mask is None:
            if front.counts is None and (self.door.causal or not front.P):
                return
            mask = torch.ones(self.batch, cast(int, self.tokens + past), dtype=torch.long, device=self.device)
        if isinstance(mask, Mapping):
            self.call["attention_mask"] = {
                k: self._extend_one_mask(m, shown, runs, k, past, inner) for k, m in mask.items()
            }
        else:
            self.call["attention_mask"] = self._extend_one_mask(mask, shown, runs, "", past, inner)

    def _extend_one_mask(
        self, mask: object, shown: Tensor, runs: int, layers: str, past: int | Tensor, inner: Cache | None
    ) -> Any:
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"attention_mask is a {type(mask).__name__}, which cannot be extended by virtual tokens; pass a 2-D mask "
                "(batch, tokens) or a 4-D tensor (batch, 1, queries, keys)"
            )
        if mask.ndim == 2:
            return torch.cat([shown.to(mask.dtype), mask], 1)
        if mask.ndim != 4:
            raise ValueError(
                f"attention_mask has {mask.ndim} dimensions; pass (batch, tokens) or (batch, 1, queries, keys)"
            )
        seen = shown[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)  # (batch, heads, queries, P + T)
        window = getattr(getattr(self.stack, "config", None), "sliding_window", None)
        if "sliding" in layers and window:
            offset = 0 if inner is None else _sliding_offset(inner)
            if offset > 0:
                return mask  # the window has moved past the virtual positions
            query = torch.arange(mask.shape[2], device=self.device) + past + shown.shape[1]
            near = torch.arange(shown.shape[1], device=self.device)[None] > query[:, None] - window
            seen = seen & near
        full = torch.cat([mask_like(seen, mask), mask], -1)
        if not runs or (mask.shape[2] == 1 and not self.door.causal):
            return full
        return torch.cat([self._prompt_rows(full, shown, runs), full], 2)

    def _prompt_rows(self, full: Tensor, shown: Tensor, runs: int) -> Tensor:
        """The mask of the prompt's own tokens, (batch, heads, T, keys) in the form of `full`."""
        keys, start = full.shape[-1], shown.shape[1] - runs
        rows = torch.zeros(self.batch, full.shape[1], runs, keys, dtype=torch.bool, device=self.device)
        if self.door.causal:
            before = torch.ones(runs, shown.shape[1], dtype=torch.bool, device=self.device).tril(start)
            rows[..., : shown.shape[1]] = before & shown[:, None, None]
        else:
            visible = full if full.dtype == torch.bool else full > torch.finfo(full.dtype).min / 2
            rows[:] = visible.any(2, keepdim=True)
        return mask_like(rows, full)

    def _check_length(self, past: int | Tensor) -> None:
        most = self.door.positions
        if most is None or isinstance(past, Tensor):
            return
        virtual = self.front.P + self.front.T
        if virtual + past + self.tokens > most:
            raise ValueError(
                f"{virtual} virtual tokens and {past + self.tokens} tokens are more than the {most} positions of "
                f"{type(self.stack).__name__}; shorten the input to {max(most - virtual, 0)} tokens, or use fewer "
                "virtual tokens"
            )


def _sliding_offset(cache: Cache | None) -> int:
    """How far the window of a cache's sliding layers has moved."""
    from . import kv_cache as kv

    own = kv.own_cache(cache)
    at = next((i for i, sliding in enumerate(own.is_sliding) if sliding), 0)
    return int(own.get_mask_sizes(1, at)[1])
