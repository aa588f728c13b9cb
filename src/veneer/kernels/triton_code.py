"""What runs on the device: three products of low-rank updates, and the gate of an MLP. Imports triton.

A program owns a block of rows of the tokens. Plain calls number the rows; routed calls (`order` given) take the
rows of one adapter's segment, so that a block multiplies by one A or B, as in Punica's SGMV (Chen et al. 2023,
arxiv.org/abs/2310.18547) and S-LoRA (Sheng et al. 2023, arxiv.org/abs/2311.03285). Dropout (`seed` given) draws its
mask from a counter, so that every kernel finds the same mask and none is stored. Sums are in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, p, rows, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries (rows, first ... first + COLUMNS) are kept; `first` is a multiple of 4.

    Entry (m, k) takes word k mod 4 of Philox-4x32-10 at the counter (k div 4, m, 0, 0).
    """
    group = first // 4 + tl.arange(0, COLUMNS // 4)
    c0 = tl.broadcast_to(group[None, :], [ROWS, COLUMNS // 4]).to(tl.int32)
    c1 = tl.broadcast_to(rows[:, None], [ROWS, COLUMNS // 4]).to(tl.int32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, zero, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # (ROWS, COLUMNS), words in turn
    return tl.uint_to_uniform_float(words) >= p


@triton.jit
def shrink_kernel(
    x, A, h, scales, gain, seed, p, order, offsets, block_slot, block_first,
    M, R, K, span,
    x_m, x_k, A_s, A_r, A_k, h_split, h_m, h_r,
    PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h[split, m] = gain * scales[slot] * (x ⊙ mask)[m, columns of the split] A[slot]^T."""
    block = tl.program_id(0)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    split = tl.program_id(2)
    if order is not None:
        slot = tl.load(block_slot + block)
        if slot < 0:  # the grid has room for the worst split into segments
            return
        at = tl.load(block_first + block) + tl.arange(0, BM)
        live = at < tl.load(offsets + slot + 1)
        rows = tl.load(order + at, mask=live, other=0).to(tl.int64)
        A += slot.to(tl.int64) * A_s
        if scales is not None:
            gain *= tl.load(scales + slot)
    else:
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        live = rows < M
    acc = tl.zeros([BM, BR], dtype=tl.float32)
    for k0 in range(split * span, tl.minimum(K, split * span + span), BK):
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x + rows[:, None] * x_m + k[None, :] * x_k, mask=live[:, None] & (k < K)[None, :], other=0.0)
        if seed is not None:
            xs = tl.where(keep_mask(seed, p, rows, k0, BM, BK), xs, 0.0)
        As = tl.load(A + k[:, None] * A_k + r[None, :] * A_r, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(xs.to(x.dtype.element_ty), As.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    out = h + split.to(tl.int64) * h_split + rows[:, None] * h_m + r[None, :] * h_r
    tl.store(out, (acc * gain).to(h.dtype.element_ty), mask=live[:, None] & (r < R)[None, :])


@triton.jit
def expand_kernel(
    h, B, y, scales, gain, seed, p, order, offsets, block_slot, block_first,
    M, N, R,
    h_m, h_r, B_s, B_n, B_r, y_m, y_n,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[m] += gain * scales[slot] * (h[m] B[slot]^T) ⊙ mask[m]."""
    block = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    n = n0 + tl.arange(0, BN)
    if order is not None:
        slot = tl.load(block_slot + block)
        if slot < 0:
            return
        at = tl.load(block_first + block) + tl.arange(0, BM)
        live = at < tl.load(offsets + slot + 1)
        rows = tl.load(order + at, mask=live, other=0).to(tl.int64)
        B += slot.to(tl.int64) * B_s
        if scales is not None:
            gain *= tl.load(scales + slot)
    else:
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        live = rows < M
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        hs = tl.load(h + rows[:, None] * h_m + r[None, :] * h_r, mask=live[:, None] & (r < R)[None, :], other=0.0)
        Bs = tl.load(B + r[:, None] * B_r + n[None, :] * B_n, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(hs.to(y.dtype.element_ty), Bs.to(y.dtype.element_ty), acc, input_precision=PRECISION)
    acc *= gain
    if seed is not None:
        acc = tl.where(keep_mask(seed, p, rows, n0, BM, BN), acc, 0.0)
    out = y + rows[:, None] * y_m + n.to(tl.int64)[None, :] * y_n
    inside = live[:, None] & (n < N)[None, :]
    acc += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    g, x, w, scales, gain, seed, p, order, offsets,
    M, R, K, splits,
    g_m, g_r, x_m, x_k, w_split, w_s, w_r, w_k,
    PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w[split, slot] = gain * scales[slot] * g[rows of slot]^T (x ⊙ mask)[rows of slot], blocks of rows dealt out."""
    k0 = tl.program_id(0) * BK
    k = k0 + tl.arange(0, BK)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    slot = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    first = 0
    last = M
    if order is not None:
        first = tl.load(offsets + slot)
        last = tl.load(offsets + slot + 1)
        if scales is not None:
            gain *= tl.load(scales + slot)
    acc = tl.zeros([BR, BK], dtype=tl.float32)
    for m0 in range(first + split * BM, last, splits * BM):
        at = m0 + tl.arange(0, BM)
        live = at < last
        if order is not None:
            rows = tl.load(order + at, mask=live, other=0).to(tl.int64)
        else:
            rows = at.to(tl.int64)
        gs = tl.load(g + rows[None, :] * g_m + r[:, None] * g_r, mask=(r < R)[:, None] & live[None, :], other=0.0)
        xs = tl.load(x + rows[:, None] * x_m + k[None, :] * x_k, mask=live[:, None] & (k < K)[None, :], other=0.0)
        if seed is not None:
            xs = tl.where(keep_mask(seed, p, rows, k0, BM, BK), xs, 0.0)
        acc = tl.dot(gs.to(x.dtype.element_ty), xs.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    out = w + split.to(tl.int64) * w_split + slot.to(tl.int64) * w_s + r[:, None] * w_r + k[None, :] * w_k
    tl.store(out, (acc * gain).to(w.dtype.element_ty), mask=(r < R)[:, None] & (k < K)[None, :])


@triton.jit
def bent(e, GELU: tl.constexpr):
    """act(e) and act'(e): both are e times a sigmoid, with tanh(u) = 2 sigmoid(2 u) - 1 for gelu's approximation."""
    if GELU:
        s = tl.sigmoid(1.5957691216057308 * (e + 0.044715 * e * e * e))  # 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * e * e)
    else:
        s = tl.sigmoid(e)
        slope = 1.0
    return e * s, s + e * s * (1.0 - s) * slope


@triton.jit
def gate_kernel(e, g, m, F, blocks, e_m, g_m, m_m, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Compute m = act(e) * g."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    es = tl.load(e + row * e_m + f, mask=f < F, other=0.0).to(tl.float32)
    gs = tl.load(g + row * g_m + f, mask=f < F, other=0.0).to(tl.float32)
    act, _ = bent(es, GELU)
    tl.store(m + row * m_m + f, (act * gs).to(m.dtype.element_ty), mask=f < F)


@triton.jit
def gate_backward_kernel(
    dm, e, g, dg, m, F, blocks, dm_m, e_m, g_m, dg_m, m_m, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute de = dm * g * act'(e) over dm, dg = dm * act(e), and m again where it is asked for."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    f = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dms = tl.load(dm + row * dm_m + f, mask=f < F, other=0.0).to(tl.float32)
    es = tl.load(e + row * e_m + f, mask=f < F, other=0.0).to(tl.float32)
    gs = tl.load(g + row * g_m + f, mask=f < F, other=0.0).to(tl.float32)
    act, slope = bent(es, GELU)
    tl.store(dm + row * dm_m + f, (dms * gs * slope).to(dm.dtype.element_ty), mask=f < F)
    tl.store(dg + row * dg_m + f, (dms * act).to(dg.dtype.element_ty), mask=f < F)
    if m is not None:
        tl.store(m + row * m_m + f, (act * gs).to(m.dtype.element_ty), mask=f < F)
