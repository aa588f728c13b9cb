"""A weight W + sum_i s_i B_i A_i that is used without being formed.

A bare parameter is used by its module on the module's own terms, so its adapters can only act as an effective
weight. For E stacked experts that is an (E, out, in) tensor on every forward, and its gradient on every backward.
`Lazy` stands in for the parameter during one call. Where the module uses it as a linear map, the low-rank part acts
on the activations: a routed token x of expert e gives x W_e^T + (x A_e^T) B_e^T, all tokens in a grouped product over
the same offsets where the module makes one. Everything else (an elementwise function, a kernel of its own) gets the
effective weight, formed then and kept for the rest of the call, and gradients reach A and B through it.

Small matrices are cast to the dtype of W; activations keep theirs.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..algebra.low_rank import Factored
from ..algebra.modes import functions_ready
from ..algebra.operator import Operator
from ..algebra.recursion import Semantics, Terms, evaluate, walk_terms
from ..algebra.sums import terms_of as parts_of
from ..backends.deferred import READ, Deferred

LowRankTerm = tuple[Tensor, Tensor, float]  # B (..., out, r), A (..., r, in), scale


def lazy_weight(weight: Tensor, terms: Terms, *, flipped: bool = False) -> Tensor | None:
    """`weight` with the adapters of `terms`, not formed; None where it has to be.

    Args:
        weight: (out, in), or (experts, out, in); a `Deferred` stays one.
        terms: of the adapters, in order. Each may only add factored matrices.
        flipped: `weight` is stored as (in, out), or (experts, in, out).
    """
    factors = factors_of(terms)
    if not factors or weight.ndim not in (2, 3) or any(B.ndim != weight.ndim for B, _, _ in factors):
        return None
    if type(weight) not in (Tensor, nn.Parameter, Deferred) or not weight.is_floating_point():
        return None  # sharded, quantized
    if torch.compiler.is_compiling() or not functions_ready():  # `Formed` has a backward only
        return None
    return make_lazy(weight, LowRank(factors, weight.dtype), flipped)


class FactorSemantics(Semantics[None, "list[LowRankTerm]"]):
    """Terms as the factored matrices that they add to a weight."""

    def delta(self, op: Operator, x: None, y: list[LowRankTerm]) -> list[LowRankTerm]:
        return y + [(o.B, o.A, o.scale) for o in parts_of(op) if isinstance(o, Factored)]

    def mix(
        self, y: list[LowRankTerm], share: float, branch: list[LowRankTerm], start: list[LowRankTerm]
    ) -> list[LowRankTerm]:
        return y + [(B, A, scale * share) for B, A, scale in branch[len(start) :]]


def factors_of(terms: Terms) -> list[LowRankTerm] | None:
    """The factored matrices that `terms` add to the weight, or None if they do something else."""
    for term in walk_terms(terms):
        if any(part is not None for part in (term.left, term.right, term.shift, term.post)):
            return None
        if not all(isinstance(op, Factored) and op.bare for op in parts_of(term.delta)):
            return None
    return evaluate(terms, FactorSemantics(), None, lambda _: [])


class LowRank:
    """sum_i s_i B_i A_i as one product B A, for one matrix or for each of E experts.

    Attributes:
        terms: B (out, r) and A (r, in), or (E, out, r) and (E, r, in), each with its scale.
        dtype: of the weight to which it is added.
        trained: gradients go to a factor.
    """

    __slots__ = ("both", "dtype", "experts", "terms", "trained")

    def __init__(self, terms: Sequence[LowRankTerm], dtype: torch.dtype) -> None:
        self.terms, self.dtype = terms, dtype
        self.trained = torch.is_grad_enabled() and any(B.requires_grad or A.requires_grad for B, A, _ in terms)
        self.both: tuple[Tensor, Tensor] | None = None
        self.experts: list[LowRank] | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (..., out, R) with the scales in it and A (..., R, in), R being the sum of the ranks.

        For stacked experts R is rounded up, with zeros, to the 16 bytes that grouped products ask for.
        """
        if self.both is None:
            with torch.set_grad_enabled(self.trained):
                self.both = join_terms(self.terms, self.dtype, aligned=True)
        return self.both

    def expert(self, e: int) -> LowRank:
        """The product of one expert."""
        if not self.trained:  # few experts may be asked for, and then only theirs is cast
            return LowRank([(B[e], A[e], scale) for B, A, scale in self.terms], self.dtype)
        if self.experts is None:  # one backward for all experts, in place of a padded gradient from each
            with torch.enable_grad():
                self.experts = []
                for pair in zip(*(f.unbind() for f in self.factors()), strict=True):
                    one = LowRank([(*pair, 1.0)], self.dtype)
                    one.trained, one.both = True, pair
                    self.experts.append(one)
        return self.experts[e]

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """B (S, out, R) and A (S, R, in) of the experts `ids` (S,)."""
        return join_terms([(B[ids], A[ids], scale) for B, A, scale in self.terms], self.dtype)


def join_terms(terms: Sequence[LowRankTerm], dtype: torch.dtype, aligned: bool = False) -> tuple[Tensor, Tensor]:
    Bs = [(B if scale == 1 else B * scale).to(dtype) for B, _, scale in terms]
    As = [A.to(dtype) for _, A, _ in terms]
    B, A = (Bs[0], As[0]) if len(terms) == 1 else (torch.cat(Bs, -1), torch.cat(As, -2))
    spare = -A.shape[-2] % (16 // dtype.itemsize) if aligned and A.ndim == 3 else 0
    if spare:
        B, A = F.pad(B, (0, spare)), F.pad(A, (0, 0, 0, spare))
    return B.contiguous(), A.contiguous()


class Lazy(Tensor):
    """base + B A, or its transpose, not formed. It has no memory of its own.

    Attributes:
        base: (m, n), or (E, m, n).
        low: what is added to it.
        flipped: m is the weight's input and n its output, so base + A^T B^T is meant.
        ids: (S,) int, or None. The experts taken from the stack: the tensor is (S, m, n).
        formed: the effective weight, once something needed it.
    """

    base: Tensor
    low: LowRank
    flipped: bool
    ids: Tensor | None
    formed: Tensor | None

    @staticmethod
    def __new__(cls, base: Tensor, low: LowRank, flipped: bool, ids: Tensor | None) -> Lazy:
        shape = base.shape if ids is None else (ids.shape[0], *base.shape[1:])
        made: Lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=base.dtype, device=base.device)
        made.base, made.low, made.flipped, made.ids, made.formed = base, low, flipped, ids, None
        return made

    def sides(self) -> tuple[Tensor, Tensor]:
        """(..., m, R) and (..., R, n), whose product is added to base."""
        return transpose_factors(self.low.factors(), self.flipped)

    def gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Base (S, m, n) and the sides (S, m, R), (S, R, n) of the experts taken."""
        assert self.ids is not None
        return self.base[self.ids], *transpose_factors(self.low.rows(self.ids), self.flipped)

    def form(self) -> Tensor:
        """The effective weight."""
        if self.ids is None:
            left, right = self.sides()
            return self.base + left @ right
        base, left, right = self.gathered()
        return base + left @ right

    def dense(self) -> Tensor:
        """The effective weight, formed once."""
        if self.formed is None:
            with torch.set_grad_enabled(self.low.trained or torch.is_grad_enabled()):
                self.formed = self.form()
        return self.formed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READ:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        use = USES.get(func)
        if use is not None:
            result = use(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(lambda a: a.dense() if isinstance(a, Lazy) else a, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Below autograd: reached only from inside another autograd Function. `Formed` brings the gradient back.
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, Lazy) and argument.alias_info is not None and argument.alias_info.is_write:
                raise RuntimeError(f"{func}: an adapted weight cannot be written to inside an autograd Function")
        args, kwargs = tree_map(lambda a: a.form() if isinstance(a, Lazy) else a, (args, kwargs or {}))
        return func(*args, **kwargs)


class Formed(torch.autograd.Function):
    """Makes a `Lazy` whose gradient, where something asks for it whole, goes to base, B and A."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, B: Tensor, A: Tensor, low: LowRank, flipped: bool, ids: Tensor | None) -> Lazy:
        ctx.save_for_backward(B, A, ids)
        ctx.flipped = flipped
        return Lazy(base, low, flipped, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # (..., m, n)
        B, A, ids = ctx.saved_tensors
        g = grad.mT if ctx.flipped else grad  # (..., out, in)
        if ids is None:
            return grad, g @ A.mT, B.mT @ g, None, None, None
        dB = torch.zeros_like(B).index_add(0, ids, g @ A[ids].mT)
        dA = torch.zeros_like(A).index_add(0, ids, B[ids].mT @ g)
        whole = None
        if ctx.needs_input_grad[0]:
            whole = grad.new_zeros(B.shape[0], *grad.shape[1:]).index_add(0, ids, grad)
        return whole, dB, dA, None, None, None


def make_lazy(base: Tensor, low: LowRank, flipped: bool, ids: Tensor | None = None) -> Tensor:
    """A `Lazy`, known to autograd where gradients go to it."""
    if low.trained or (base.requires_grad and torch.is_grad_enabled()):
        made: Tensor = Formed.apply(base, *low.factors(), low, flipped, ids)  # type: ignore[no-untyped-call]
        return made
    return Lazy(base, low, flipped, ids)


def transpose_factors(factors: tuple[Tensor, Tensor], flipped: bool) -> tuple[Tensor, Tensor]:
    """B, A, or A^T, B^T of the transpose."""
    B, A = factors
    return (A.mT, B.mT) if flipped else (B, A)


# The uses of a weight as a linear map. Each returns NotImplemented where it is none.


def has_no_lazy(*operands: object) -> bool:
    """Whether the last operand is a `Lazy` that was not formed, and no other is one."""
    *others, weight = operands
    return isinstance(weight, Lazy) and weight.formed is None and not any(isinstance(o, Lazy) for o in others)


def add_product(y: Tensor, h: Tensor, right: Tensor) -> Tensor:
    """Y (..., n) + h (..., R) right (R, n), in the memory of y where it is known to be ours."""
    right = right.to(y.dtype)
    if y.dtype == h.dtype and y.ndim == h.ndim == right.ndim == 2:
        return y.addmm_(h, right)
    return y + (h @ right).to(y.dtype)


def lazy_product(func: Any, a: Any, b: Any) -> Any:
    """A @ b with either of them the weight."""
    if func is Tensor.__rmatmul__:
        a, b = b, a
    if has_no_lazy(a, b):
        if b.ids is not None:
            return expert_products(a, b)
        left, right = b.sides()
        return add_product(a @ b.base, a @ left, right)
    if not has_no_lazy(b, a):
        return NotImplemented
    if a.ids is not None:  # (S, m, n) (S, n, t) = ((S, t, n) (S, n, m))^T
        y = expert_products(b.mT, a.mT) if b.ndim == 3 else NotImplemented
        return y if y is NotImplemented else y.mT
    left, right = a.sides()
    y, h = a.base @ b, right @ b
    return add_product(y, left, h) if y.ndim == 2 else y + (left @ h).to(y.dtype)


def lazy_bmm(func: Any, a: Any, b: Any, out_dtype: torch.dtype | None = None) -> Any:
    """torch.mm, torch.bmm."""
    return lazy_product(func, a, b) if out_dtype is None and a.ndim == b.ndim else NotImplemented


def added_to(func: Any, start: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """torch.addmm, torch.baddbmm."""
    if isinstance(start, Lazy) or a.ndim != b.ndim:
        return NotImplemented
    y = lazy_product(func, a, b)
    if y is NotImplemented:
        return y
    y = y if alpha == 1 else y * alpha
    return y if beta == 0 else y + (start if beta == 1 else start * beta)


def lazy_linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if not has_no_lazy(x, bias, weight) or weight.ids is not None or weight.ndim != 2:
        return NotImplemented
    left, right = weight.sides()  # (m, R), (R, n)
    return add_product(F.linear(x, weight.base, bias), F.linear(x, right), left.T)


def lazy_grouped_mm(func: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """F.grouped_mm, torch._grouped_mm: rows x (S, m), sorted by expert, through (E, m, n) -> (S, n)."""
    offs = args[0] if args else kwargs.get("offs")
    same = kwargs.get("out_dtype") in (None, x.dtype)
    if not has_no_lazy(x, weight) or weight.ids is not None or x.ndim != 2 or offs is None or not same or args[1:]:
        return NotImplemented
    y = func(x, weight.base, *args, **kwargs)
    experts, tokens = weight.base.shape[0], x.shape[0]
    if tokens >= experts or weight.low.trained:
        left, right = weight.sides()
        return y + func(func(x, left, offs=offs), right, offs=offs)
    # Fewer tokens than experts: only the factors that they meet are read. Rows past the last offset belong to none.
    ids = torch.searchsorted(offs, torch.arange(tokens, device=x.device, dtype=offs.dtype), right=True)
    left, right = transpose_factors(weight.low.rows(ids.clamp_(max=experts - 1)), weight.flipped)
    return y + ((x.unsqueeze(1) @ left) @ right).squeeze(1)


def expert_products(x: Tensor, weight: Lazy) -> Any:
    """X (S, t, m), each with the expert that was taken for it, -> (S, t, n)."""
    assert weight.ids is not None
    if x.ndim != 3 or x.shape[0] != weight.ids.shape[0]:
        return NotImplemented
    base, ids = weight.base, weight.ids
    if x.shape[1] != 1 or not can_group(x, base):
        base, left, right = weight.gathered()
        return x @ base + (x @ left) @ right
    # Sorted by expert, no copy of a weight is made for each token.
    ids, order = ids.sort()
    offs = torch.searchsorted(ids, torch.arange(base.shape[0], device=ids.device, dtype=ids.dtype), right=True)
    rows = x.squeeze(1).index_select(0, order)  # (S, m)
    stack = Lazy(base, weight.low, weight.flipped, None)
    y = lazy_grouped_mm(F.grouped_mm, rows, stack, offs=offs.to(torch.int32))  # (S, n)
    return y.index_select(0, order.argsort()).unsqueeze(1)


def can_group(x: Tensor, base: Tensor) -> bool:
    """Whether torch's grouped product takes x and base (E, m, n), and needs no wait for the device."""
    if x.dtype != base.dtype or torch.is_autocast_enabled(x.device.type) or not hasattr(F, "grouped_mm"):
        return False
    if base.device.type == "cuda":
        fits = base.dtype == torch.bfloat16 and torch.cuda.get_device_capability(base.device) >= (8, 0)
    else:
        fits = base.device.type == "cpu" and base.dtype in (torch.float32, torch.bfloat16, torch.float16)
    m, n = base.shape[1:]
    dense = base.is_contiguous() or base.mT.is_contiguous()
    return fits and dense and not (m * base.element_size()) % 16 and not (n * base.element_size()) % 16


def lazy_einsum(func: Any, equation: Any, *operands: Any) -> Any:
    """An equation of two operands in which one axis of the weight's matrix is summed and the other kept."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return NotImplemented
    given, out = equation.replace(" ", "").split("->")
    terms = given.split(",")
    place = 1 if isinstance(operands[1], Lazy) else 0
    weight, x, letters, other = operands[place], operands[1 - place], terms[place], terms[1 - place]
    if not has_no_lazy(x, weight) or weight.ids is not None or "." in letters or len(set(letters)) < len(letters):
        return NotImplemented
    left, right = weight.sides()  # (..., m, R), (..., R, n)
    stack, m, n = letters[:-2], letters[-2], letters[-1]
    R = next(c for c in string.ascii_letters if c not in equation)
    if n in other and n not in out and m in out and m not in other:
        summed, first, second, spec_1, spec_2 = n, right, left, f"{stack}{R}{n}", f"{stack}{m}{R}"
    elif m in other and m not in out and n in out and n not in other:
        summed, first, second, spec_1, spec_2 = m, left, right, f"{stack}{m}{R}", f"{stack}{R}{n}"
    else:
        return NotImplemented
    inner = other.replace(summed, "") + "".join(c for c in stack if c not in other) + R
    h = torch.einsum(f"{other},{spec_1}->{inner}", x, first)
    base = (x, weight.base) if place else (weight.base, x)
    return torch.einsum(equation, *base) + torch.einsum(f"{inner},{spec_2}->{out}", h, second)


def lazy_item(func: Any, weight: Any, index: Any) -> Any:
    """weight[e] (m, n) for one expert, weight[ids] (S, m, n) for several."""
    if not has_no_lazy(index, weight) or weight.ids is not None or weight.ndim != 3:
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8) or index.ndim > 1:
            return NotImplemented
        if index.ndim == 1:  # counted from the front, and an error where there is no such expert
            ids = torch.arange(weight.base.shape[0], device=weight.base.device)[index]
            return make_lazy(weight.base, weight.low, weight.flipped, ids)
        index = int(index)
    if type(index) is not int:
        return NotImplemented
    return make_lazy(weight.base[index], weight.low.expert(index), weight.flipped)


def lazy_transpose(func: Any, weight: Any, *axes: Any) -> Any:
    """The transpose of the matrix, by any of its names."""
    axes = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], (list, tuple)) else axes
    if not has_no_lazy(weight) or (not axes and func in FLAT and weight.ndim != 2):
        return NotImplemented
    last = {weight.ndim - 1, weight.ndim - 2}
    if func in PERMUTES:
        wanted = [a % weight.ndim for a in axes]
        if wanted != [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]:
            return NotImplemented
    elif axes and {a % weight.ndim for a in axes} != last:
        return NotImplemented
    return make_lazy(weight.base.mT, weight.low, not weight.flipped, weight.ids)


FLAT = {Tensor.T.__get__, Tensor.t, torch.t}  # type: ignore[attr-defined]
PERMUTES = {Tensor.permute, torch.permute}

USES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), lazy_product),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), lazy_bmm),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), added_to),
    F.linear: lazy_linear,
    torch.einsum: lazy_einsum,
    Tensor.__getitem__: lazy_item,
    **dict.fromkeys(
        (
            *FLAT,
            *PERMUTES,
            Tensor.mT.__get__,  # type: ignore[attr-defined]
            *(getattr(space, name) for space in (torch, Tensor) for name in ("transpose", "swapaxes", "swapdims")),
        ),
        lazy_transpose,
    ),
    **dict.fromkeys(
        (getattr(s, n) for s, n in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(s, n)), lazy_grouped_mm
    ),
}
