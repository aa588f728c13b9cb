"""Orthonormal start. Büyükakyüz 2024, arxiv.org/abs/2406.01775."""

from __future__ import annotations

import torch
from torch import Tensor


def start_olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1: with W = Q R, B = Q[:, :r] and A = R[:r].

    Args:
        weight: (out, in), float32.
        r: rank, at most min(out, in).
        scale: unused; the share taken out of the base is scale * B A.

    Returns:
        B (out, r) with orthonormal columns and A (r, in).
    """
    if r > min(weight.shape):
        raise ValueError(f"init 'olora': r={r} is above the rank of a {tuple(weight.shape)} weight; use a smaller r")
    Q, R = torch.linalg.qr(weight)
    return Q[:, :r], R[:r]
