"""Virtual tokens of the active adapters for one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class VirtualTokens:
    """Virtual tokens before the rows of a batch.

    Attributes:
        prefix: keys and values (batch or 1, layers, 2, heads, P, head width), or None.
        prompt: embeddings (batch or 1, T, width), or None.
        counts: for each row how many of P and of T are its own, (batch, 2); None if all are. A row's own are the last.
        key: identifies the adapters, tensor versions and tasks that they were computed from.
    """

    prefix: Tensor | None
    prompt: Tensor | None
    counts: Tensor | None
    key: tuple[Any, ...]

    @property
    def P(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[-2]

    @property
    def T(self) -> int:
        return 0 if self.prompt is None else self.prompt.shape[-2]

    @staticmethod
    def joined(parts: Sequence[VirtualTokens]) -> VirtualTokens | None:
        """Several adapters' virtual tokens one after another."""
        if len(parts) < 2:
            return parts[0] if parts else None
        prefixes = [f.prefix for f in parts if f.prefix is not None]
        prompts = [f.prompt for f in parts if f.prompt is not None]
        return VirtualTokens(
            torch.cat([p.expand(_widest_batch(prefixes), -1, -1, -1, -1, -1) for p in prefixes], -2)
            if prefixes
            else None,
            torch.cat([p.expand(_widest_batch(prompts), -1, -1) for p in prompts], -2) if prompts else None,
            None,
            tuple(k for f in parts for k in f.key),
        )

    @staticmethod
    def mixed(parts: Sequence[VirtualTokens | None], which: Sequence[int]) -> VirtualTokens | None:
        """Each row's own virtual tokens: row r has those of `parts[which[r]]`, which may be none."""
        there = [f for f in parts if f is not None]
        if not there:
            return None
        P, T = max(f.P for f in there), max(f.T for f in there)
        sample = next((f.prefix for f in there if f.prefix is not None), None)
        words = next((f.prompt for f in there if f.prompt is not None), None)
        prefixes, prompts = [], []
        for row, i in enumerate(which):
            f = parts[i]
            if sample is not None:
                own = None if f is None or f.prefix is None else _row_of(f.prefix, row)
                blank = sample.new_zeros(
                    (1, *sample.shape[1:4], P - (0 if own is None else own.shape[-2]), sample.shape[-1])
                )
                prefixes.append(blank if own is None else torch.cat([blank, own], -2))
            if words is not None:
                own = None if f is None or f.prompt is None else _row_of(f.prompt, row)
                blank = words.new_zeros((1, T - (0 if own is None else own.shape[-2]), words.shape[-1]))
                prompts.append(blank if own is None else torch.cat([blank, own], -2))
        sizes = [(0, 0) if parts[i] is None else (parts[i].P, parts[i].T) for i in which]  # type: ignore[union-attr]
        even = all(s == (P, T) for s in sizes)
        device = (sample if sample is not None else words).device  # type: ignore[union-attr]
        return VirtualTokens(
            torch.cat(prefixes) if prefixes else None,
            torch.cat(prompts) if prompts else None,
            None if even else torch.tensor(sizes, device=device),
            (tuple(which), *(k for f in there for k in f.key)),
        )

    def rows(self, batch: int) -> VirtualTokens:
        """The same for a batch that `generate` has repeated each row of (beams, several sequences)."""
        have = max(0 if t is None else t.shape[0] for t in (self.prefix, self.prompt, self.counts))
        if have in (1, batch):
            return self
        if batch % have:
            raise ValueError(
                f"adapter_names or task_ids are for {have} rows, but the batch has {batch}; give one for each row"
            )
        prefix, prompt, counts = (
            t if t is None or t.shape[0] == 1 else t.repeat_interleave(batch // have, 0)
            for t in (self.prefix, self.prompt, self.counts)
        )
        return VirtualTokens(prefix, prompt, counts, self.key)

    def mask(self, batch: int, device: torch.device) -> Tensor:
        """Which virtual positions a row may attend to, (batch, P + T) bool."""
        if self.counts is None:
            return torch.ones(batch, self.P + self.T, dtype=torch.bool, device=device)
        mine = self.counts.to(device).expand(batch, 2)
        return torch.cat(
            [torch.arange(n, device=device) >= n - mine[:, i : i + 1] for i, n in enumerate((self.P, self.T))], 1
        )

    def offset(self, device: torch.device) -> Tensor | int:
        """How many virtual positions come before a row's first token: a number, or (batch, 1)."""
        return self.P + self.T if self.counts is None else self.counts.to(device).sum(1, keepdim=True)

    def prompt_positions(self, batch: int, device: torch.device) -> Tensor:
        """Positions of the prompt's tokens, (batch, T); those that are not a row's own are masked and stand at 0."""
        steps = torch.arange(self.T, device=device).expand(batch, -1)
        if self.counts is None:
            return steps + self.P
        mine = self.counts.to(device).expand(batch, 2)
        return (steps - (self.T - mine[:, 1:]) + mine[:, :1]).clamp_min(0)


def _widest_batch(parts: Sequence[Tensor]) -> int:
    return max(p.shape[0] for p in parts)


def _row_of(t: Tensor, row: int) -> Tensor:
    return t if t.shape[0] == 1 else t[row : row + 1]


def join_positions(a: Tensor, b: Tensor) -> Tensor:
    batch = max(a.shape[0], b.shape[0])
    return torch.cat([a.to(b).expand(batch, -1, -1, -1), b.expand(batch, -1, -1, -1)], -2)
