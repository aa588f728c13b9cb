"""A linear layer with low-rank adapters as one function of its input, alone or with the layers that share the input.

    y_i = (x W_i^T + s_i (x A_i^T) B_i^T) diag(d_i) + b_i

Forward adds the low-rank part into the base product; backward adds into the gradient of x. What is kept for backward is
x, which siblings and the rest of the model share, and x A^T. One product with all A of the siblings serves them all, and
so does one with all of their gradients. Small matrices are cast to the dtype of x, x never to theirs.

Plain products are PyTorch's on every device, a GPU's too: they are what its library is made for. Those that see what
dropout leaves of x are in `dropout`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..algebra.modes import functions_ready, shapes_only_enabled
from . import decode, dropout, scratch
from .member import gathers_alone

if TYPE_CHECKING:
    from .member import Member, Share


# W + s B A for one call pays where its pass over W is cheaper than the passes over x and y: measured on two CPUs, an
# entry of W costs as much as 2.4 of x and y.
MERGE = 2.4
SMALL = 2**16  # entries of x below which an autograd function of ours takes longer to start than it saves
MERGED = (torch.float32, torch.float64)  # dtypes in which W + s B A loses nothing that matters

Tensors = Sequence[Tensor]
Maybe = Sequence[Tensor | None]
Lists = tuple[Tensors, Maybe, Tensors, Tensors, Maybe]  # W, b, A, B and d of each share


class Alone:
    """The kernel of one layer."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        if layer is not self.member.layer:
            return None
        held = self.member.site.router.local.decoding
        if held is not None and self not in held and decode.is_token(x):
            decode.serve_token(held, (self,), (self.member,), x)
            y = held[self](x)
            if y is not None:
                return y
        share = self.member.share()
        if share is None:
            return None
        made = run(x, (share,))
        return None if made is None else made[0]


class Pending(threading.local):
    """What a sibling computed for those after it, in this thread: the input, and the outputs not yet asked for."""

    x: Tensor | None = None
    version = 0
    grad = False
    left = 0
    ys: list[Tensor | None]


class Together:
    """Layers of one parent that its forward calls on the same input: the first one computes them all.

    Only that forward is known to call the others next, and `SiblingScope` tells that it runs. A layer that is called from
    elsewhere, or with another input, computes itself.

    Args:
        members: in the order of the calls.
        parent: the module whose forward calls them.
    """

    def __init__(self, members: Sequence[Member], parent: nn.Module) -> None:
        self.members, self.parent = tuple(members), parent
        self.ends = tuple(Sibling(self, i) for i in range(len(self.members)))
        self.pending = Pending()
        self.local = members[0].site.router.local

    def __call__(self, layer: nn.Module, x: Tensor, at: int) -> Tensor | None:
        pending = self.pending
        scope = self.local.scope
        called = scope is not None and scope.parent is self.parent
        if pending.x is x and called:
            y = pending.ys[at]
            if y is not None and pending.version == tensor_version(x) and pending.grad == torch.is_grad_enabled():
                pending.ys[at] = None
                pending.left -= 1
                if not pending.left:
                    pending.x = None
                return y
        pending.x = None
        if layer is not self.members[at].layer or type(x) is not Tensor or gathers_alone(layer):
            return None
        # Writes to a tensor of inference mode are not counted, so nothing would tell that x is still the same.
        members = self.members[at:] if called and not x.is_inference() else self.members[at : at + 1]
        held = self.local.decoding
        if held is not None and called and self.ends[at] not in held and decode.is_token(x):
            decode.serve_token(held, self.ends, self.members, x)
            y = held[self.ends[at]](x)
            if y is not None:
                return y
        shares = [member.share() for member in members]
        own = shares[0]
        if own is None:
            return None
        alike = all(s is not None and s.dropout == own.dropout and s.W.shape[1] == own.W.shape[1] for s in shares)
        made = run(x, tuple(shares) if alike else (own,))  # type: ignore[arg-type]
        return None if made is None else self.hold(x, made, at)

    def hold(self, x: Tensor, made: Sequence[Tensor], at: int) -> Tensor:
        """Keep the outputs of the siblings after `at` until they are asked for, and return its own."""
        if len(made) > 1:
            pending = self.pending
            pending.x, pending.ys, pending.left = x, [None] * (at + 1) + [*made[1:]], len(made) - 1
            pending.version, pending.grad = tensor_version(x), torch.is_grad_enabled()
            if self.local.scope is not None:
                self.local.scope.waiting.append(pending)
        return made[0]


class Sibling:
    """One layer's end of `Together`."""

    def __init__(self, together: Together, at: int) -> None:
        self.together, self.at = together, at

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        return self.together(layer, x, self.at)


def tensor_version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def run(x: Tensor, shares: tuple[Share, ...]) -> list[Tensor] | None:
    """The outputs of layers on x (..., in), or None where they have to run on their own."""
    dtype = accepted_dtype(x, shares[0].W)
    if dtype is None:
        return None
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (M, in)
    Ws, bs, As, Bs, ds, scales, p = stack_columns(shares)
    trains = torch.is_grad_enabled() and (x.requires_grad or needs_grad(bs, As, Bs, ds))
    if flat.numel() < SMALL and (trains or p):  # without gradients too where a mask is drawn, which is then the same
        ys = compose_forward(flat.to(dtype), *cast_groups(dtype, Ws, bs, As, Bs, ds), scales, p)
    elif trains:
        ys = apply(FactoredLinear, flat, (len(Ws), scales, p, dtype), *Ws, *bs, *As, *Bs, *ds)
    else:
        ys = forward(flat.to(dtype), *cast_groups(dtype, Ws, bs, As, Bs, ds), scales, p, keep=False)[0]
    return [unflatten(x, y) for y in ys]


def unflatten(x: Tensor, y: Tensor) -> Tensor:
    """An output (M, out) in the shape of x (..., in)."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def compose_forward(
    x: Tensor, Ws: Tensors, bs: Maybe, As: Tensors, Bs: Tensors, ds: Maybe, scales: Sequence[float], p: float
) -> list[Tensor]:
    """The outputs (M, out_i) for x (M, in), with autograd's own functions, which start faster than one in Python."""
    A = As[0] if len(As) == 1 else torch.cat(As)  # type: ignore[arg-type]  # (R, in)
    h = linear(torch.dropout(x, p, True) * (1 - p) if p else x, A)  # (M, R); the scales make up for what is dropped
    ys = []
    for W, b, B, d, scale, part in zip(Ws, bs, Bs, ds, scales, split_by_rank(h, Bs), strict=True):
        if d is None:
            ys.append(linear(x, W, b).addmm_(part, B.t(), alpha=scale))  # (M, out)
        else:
            y = linear(x, W).addmm_(part, B.t(), alpha=scale)
            ys.append(y * d if b is None else torch.addcmul(b, y, d))
    return ys


def stack_columns(shares: Sequence[Share]) -> tuple[Any, Any, Any, Any, Any, tuple[float, ...], float]:
    """W, b, A, B, d and the scale of each share, and the dropout; the scale makes up for what is dropped."""
    Ws, bs, As, Bs, ds, scales, ps = zip(*shares, strict=True)
    p = ps[0]
    return Ws, bs, As, Bs, ds, tuple(s / (1 - p) for s in scales) if p else scales, p


def apply(function: type[torch.autograd.Function], *args: object) -> Any:
    """`function.apply` without its care for functorch, which `ready` has taken."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def needs_grad(*groups: Maybe) -> bool:
    return any(t is not None and t.requires_grad for group in groups for t in group)


def accepted_dtype(x: Tensor, W: Tensor) -> torch.dtype | None:
    """The dtype in which x (..., in) W^T is computed, or None where the layer has to run, or to complain, on its own."""
    if type(x) is not Tensor or x.shape[-1] != W.shape[1] or x.device != W.device or not functions_ready():
        return None
    kind = x.device.type
    if kind == "meta":  # autocast knows no such device
        return x.dtype if shapes_only_enabled() and x.dtype == W.dtype else None
    if torch.is_autocast_enabled(kind):
        floats = (torch.float32, torch.bfloat16, torch.float16)
        return torch.get_autocast_dtype(kind) if x.dtype in floats and W.dtype in floats else None
    return x.dtype if x.dtype == W.dtype else None


def cast_groups(dtype: torch.dtype, *groups: Maybe) -> Lists:
    """Ws, bs, As, Bs and ds in the dtype of the computation."""
    return tuple([[t if t is None or t.dtype == dtype else t.to(dtype) for t in group] for group in groups])  # type: ignore[return-value]


class Kept(NamedTuple):
    """What forward leaves for backward."""

    A: Tensor  # (R, in), all A of the siblings
    h: Tensor | None  # (M, R)
    mask: Tensor | None  # packed, or its seed
    raw: list[Tensor]  # outputs before diag(d), (M, out), or the outputs themselves
    p: float  # of dropping
    undo: bool = False  # `raw` are the outputs, and diag(d) and b can be undone


def split_by_rank(h: Tensor, Bs: Tensors) -> Tensors:
    """H (M, R) in the parts of the siblings, (M, r_i)."""
    return (h,) if len(Bs) == 1 else torch.split(h, [B.shape[1] for B in Bs], 1)


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The product scale a b of two matrices."""
    return torch.mm(a, b) if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def forward(
    x: Tensor,
    Ws: Tensors,
    bs: Maybe,
    As: Tensors,
    Bs: Tensors,
    ds: Maybe,
    scales: Sequence[float],
    p: float,
    keep: bool,
    own: bool = False,
) -> tuple[list[Tensor], Kept]:
    """The outputs (M, out_i) for x (M, in), and what backward needs. Everything is in the dtype of x.

    Args:
        keep: whether there will be a backward.
        own: whether nobody else sees the outputs. On a CPU d is then undone in backward, where no entry of it is zero: a
            second tensor of the output's size costs more.
    """
    A = As[0] if len(As) == 1 else torch.cat(As)  # type: ignore[arg-type]  # (R, in)
    M, K = x.shape
    mask = dropout.mask_for(x, p) if p else None
    raw: list[Tensor] = []
    if M > MERGE * K and not p and x.dtype in MERGED and all(d is None for d in ds):
        ys = [linear(x, torch.addmm(W, B, own, alpha=s), b)
              for W, b, own, B, s in zip(Ws, bs, As, Bs, scales, strict=True)]  # fmt: skip
        return ys, Kept(A, linear(x, A) if keep else None, mask, raw, p)
    h = linear(x, A) if mask is None else dropout.shrink_dropped(mask, x, A, p)  # (M, R)
    undo = own and x.device.type == "cpu" and all(d is None or bool(d.all()) for d in ds)
    ys = []
    for W, b, B, d, part, s in zip(Ws, bs, Bs, ds, split_by_rank(h, Bs), scales, strict=True):
        if d is None:
            ys.append(linear(x, W, b).addmm_(part, B.t(), alpha=s))  # (M, out)
            continue
        y = linear(x, W).addmm_(part, B.t(), alpha=s)
        raw.append(y)
        y = y * d if keep and not undo else y.mul_(d)
        ys.append(y if b is None else y.add_(b))
    return ys, Kept(A, h, mask, raw if keep else [], p, undo)


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of the columns of a and b (M, n), (n,), some rows at a time."""
    wide = torch.promote_types(a.dtype, torch.float32)  # many parts are added
    total = a.new_zeros(a.shape[1], dtype=wide)
    for part in scratch.row_chunks(a):
        some = b[part]
        total += torch.mul(a[part], some, out=scratch.buffer_like("rows", some)).sum(0, dtype=wide)
    return total.to(a.dtype)


def backward(
    gs: Maybe,
    x: Tensor | Callable[[Tensor], Tensor] | None,
    Ws: Tensors,
    bs: Maybe,
    Bs: Tensors,
    ds: Maybe,
    kept: Kept,
    scales: Sequence[float],
    needs: Sequence[Any],
    *,
    own: bool = False,
    room: Tensor | None = None,
) -> tuple[Tensor | None, list[Any], Sequence[Any], list[Any], list[Any]]:
    """Gradients of x and of each b, A, B, d.

    Args:
        gs: gradients of the outputs (M, out_i); not all None.
        x: (M, in), or what makes it out of its gradient, which it may overwrite; None where no A is trained.
        needs: whether x needs a gradient, and for each share whether its b, A, B, d do.
        own: whether gs may be overwritten.
        room: (M, in), where the gradient of x may be put; with dropout it is not x itself.
    """
    A, h, mask, raw, p, undo = kept
    need_x, need_b, need_A, need_B, need_d = needs
    n = len(Bs)
    dbs, dBs, dds = [None] * n, [None] * n, [None] * n  # type: list[Any], list[Any], list[Any]
    first = gs[0] if gs[0] is not None else next(g for g in gs if g is not None)
    if any(need_b):
        dbs = [g.sum(0) if g is not None and wanted else None for g, wanted in zip(gs, need_b, strict=True)]
    if raw:
        left = iter(raw)
        for i, (g, b, d) in enumerate(zip(gs, bs, ds, strict=True)):
            if d is None:
                continue
            y = next(left)
            if g is not None and need_d[i]:
                dd = column_dots(g, y)  # (out,)
                if undo:
                    dd = (dd if b is None else dd - b * g.sum(0)) / d
                dds[i] = dd
        gs = [
            g if d is None or g is None else torch.mul(g, d, out=g if own else scratch.buffer_like(f"gradient {i}", g))
            for i, (g, d) in enumerate(zip(gs, ds, strict=True))
        ]
    if n == 1:
        gh = torch.mm(gs[0], Bs[0])  # type: ignore[arg-type]  # (M, R)
    else:
        gh = first.new_empty(first.shape[0], A.shape[0])
        for g, B, part in zip(gs, Bs, split_by_rank(gh, Bs), strict=True):
            part.zero_() if g is None else torch.mm(g, B, out=part)
    s = scales[0]  # in the products that follow, which scale at no cost
    if mask is not None or scales.count(s) < n:
        for part, scale in zip(split_by_rank(gh, Bs), scales, strict=True):
            part.mul_(scale)
        s = 1.0
    if any(need_B):
        # The wide product is the faster one where there are many tokens, though its result is transposed.
        wide = first.shape[0] > 128
        for i, part in enumerate(split_by_rank(h, Bs)):  # type: ignore[arg-type]
            g = gs[i]
            if g is not None and need_B[i]:
                dBs[i] = scaled_product(part.t(), g, scales[i]).t() if wide else scaled_product(g.t(), part, scales[i])
    seen = x if any(need_A) and isinstance(x, Tensor) else None
    dA = scaled_product(gh.t(), seen, s) if seen is not None and mask is None else None  # (R, in)
    dx = None
    if need_x:
        for g, W in zip(gs, Ws, strict=True):
            if g is not None:
                if dx is not None:
                    dx.addmm_(g, W)
                else:
                    dx = torch.mm(g, W) if room is None else torch.mm(g, W, out=room)
    if mask is not None:
        dA = dropout.pull_gradient(mask, gh, seen, A, dx, p)
    elif dx is not None:
        dx.addmm_(gh, A, alpha=s)
    if seen is None and any(need_A):
        seen = x(dx)  # type: ignore[operator,misc,arg-type]
        dA = scaled_product(gh.t(), seen, s) if mask is None else dropout.pull_gradient(mask, gh, seen, A, None, p)
    dAs: Sequence[Any] = (None,) * n
    if dA is not None:
        dAs = (dA,) if n == 1 else torch.split(dA, [B.shape[1] for B in Bs])
        dAs = [one if g is not None and wanted else None for one, g, wanted in zip(dAs, gs, need_A, strict=True)]
    return dx, dbs, dAs, dBs, dds


class FactoredLinear(torch.autograd.Function):
    """`forward` and `backward` for autograd. Takes x (M, in), (number of shares n, scales, dropout, dtype), then n times
    W, n times b, and so on for A, B and d.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rules: Any, *tensors: Any) -> Any:
        n, scales, p, dtype = rules
        Ws, bs, As, Bs, ds = cast_groups(dtype, *(tensors[i : i + n] for i in range(0, 5 * n, n)))
        low = x if x.dtype == dtype else x.to(dtype)
        ys, kept = forward(low, Ws, bs, As, Bs, ds, scales, p, True)
        need = ctx.needs_input_grad
        ctx.needs = need[0], *(need[i : i + n] for i in range(2 + n, 2 + 5 * n, n))
        A_needed, B_needed = any(ctx.needs[2]), any(ctx.needs[3])
        ctx.save_for_backward(
            low if A_needed else None, kept.A, kept.h if B_needed else None, kept.mask, *Ws, *Bs, *ds, *kept.raw
        )
        ctx.n, ctx.scales, ctx.p = n, scales, p
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> Any:
        n = ctx.n
        if all(g is None for g in gs):
            return (None,) * (2 + 5 * n)
        x, A, h, mask, *rest = ctx.saved_tensors
        kept = Kept(A, h, mask, rest[3 * n :], ctx.p)
        dx, *found = backward(
            gs, x, rest[:n], (None,) * n, rest[n : 2 * n], rest[2 * n : 3 * n], kept, ctx.scales, ctx.needs
        )  # fmt: skip
        return dx, None, *(None,) * n, *(t for group in found for t in group)
