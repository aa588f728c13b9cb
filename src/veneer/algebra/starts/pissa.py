"""Principal singular values and vectors. Meng et al. 2024, arxiv.org/abs/2404.02948."""

from __future__ import annotations

import torch
from torch import Tensor


def start_pissa(weight: Tensor, r: int, scale: float, *, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 2-3: with W = U S V^T, B = U_r sqrt(S_r / scale) and A = sqrt(S_r / scale) V_r^T.

    Args:
        weight: (out, in), float32.
        r: rank, at most min(out, in).
        scale: the adapter's alpha / r.
        iterations: None for the exact SVD, else subspace iterations of the randomized one (Halko et al. 2009).

    Returns:
        B (out, r) and A (r, in); scale * B A is the best rank-r part of W.
    """
    if r > min(weight.shape):
        raise ValueError(f"init 'pissa': r={r} is above the rank of a {tuple(weight.shape)} weight; use a smaller r")
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)  # loading computes the frozen start again, and must find the same one
            U, S, V = torch.svd_lowrank(weight, q=r, niter=iterations)
        Vh = V.T
    root = (S / scale).sqrt()  # (r,)
    return U * root, root[:, None] * Vh
