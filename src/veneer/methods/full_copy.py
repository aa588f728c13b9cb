"""Full copies: whole modules (`modules_to_save`), embedding rows (`trainable_token_indices`) and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..algebra.operator import Operator
from ..algebra.rows import SelectedRows
from ..layers.site import Site
from ..targets.query import Names, as_names
from ..targets.select import matches
from ..targets.suggest import suggest
from .base import Method, OtherSublayers
from .copies import combine_copies, copy_delta, init_copy
from .fields import bias_shift
from .hooks import Tensors
from .registry import method
from .tensors import Constant, Trained


@method("MODULES_TO_SAVE", internal=True)
@dataclass
class ModulesToSave(Method):
    """Modules trained as full copies, as `modules_to_save=[...]` of any config asks for.

    Args:
        modules: names (suffixes) that must exist.
        optional: names taken along where they exist (the new heads of a task).
    """

    modules: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)

    acts_on = "copies"

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str]:
        names = [n for n, _ in model.named_modules() if n and ":" not in n]
        for wanted in self.modules:
            if not any(n.endswith(wanted) for n in names):
                leaves = {n.rpartition(".")[2] for n in names}
                raise ValueError(f"modules_to_save: no module is named {wanted!r}{suggest(wanted, leaves)}")
        # By the end of the name, as peft matches here: "norm" means input_layernorm too.
        return [n for n in names if n.endswith((*self.modules, *self.optional))]


@method("TRAINABLE_TOKENS")
@dataclass
class TrainableTokensConfig(Method):
    """Rows of an embedding trained in full; an output head tied to the embedding follows them.

    Args:
        token_indices: the rows to train, without repeats.
        target_modules: name (suffix) of the embedding; None for the model's input embedding.
        init_weights: True starts at the base rows, False at random.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: Names = None
    init_weights: bool = True

    wrapped: bool = field(default=False, init=False, repr=False)  # named by another config's field
    alone: bool = field(default=False, init=False, repr=False)  # other embeddings are named beside it

    tensors = {
        "rows": Trained(
            "trainable_tokens_delta",
            name_at=lambda config, site: "token_adapter." * config.wrapped + "trainable_tokens_delta",
            shared="first",
            saved=lambda config: "once" if config.wrapped else True,
        ),
        "index": Constant(shared="first"),
    }
    components = ("token_adapter",)

    def normalize(self) -> None:
        self.target_modules = as_names(self.target_modules)

    def check(self) -> None:
        taken = self.token_indices
        bad = [i for i in taken if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if bad or len(set(taken)) != len(taken):
            raise ValueError(f"token_indices={taken!r}: must be different row numbers, 0 or more")

    @classmethod
    def for_rows(cls, model: nn.Module, rows: list[int] | Mapping[str, list[int]]) -> list[Method]:
        """The configs that `trainable_token_indices=rows` stands for, one an embedding."""
        made: list[Method] = []
        table = rows if isinstance(rows, Mapping) else dict.fromkeys([None], rows)
        for name, indices in table.items():
            config = cls(token_indices=list(indices), target_modules=name)
            config.wrapped, config.alone = True, len(table) > 1
            made.append(config)
        return made

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str]:
        modules = dict(model.named_modules())
        if self.target_modules is None:
            find = getattr(model, "get_input_embeddings", None)
            embedding = find() if find is not None else None
            first = [n for n, m in modules.items() if m is embedding]
        else:
            spec = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
            first = [n for n in modules if matches(n, spec)]
        if not first:
            named = [n for n, m in modules.items() if isinstance(m, nn.Embedding)]
            raise ValueError(
                f"trainable tokens: no embedding is named {self.target_modules!r}; the model has {', '.join(named)}"
            )
        # As in peft: what is tied follows only where the model's input embedding is meant, and it alone.
        inputs = getattr(model, "get_input_embeddings", lambda: None)()
        if self.alone or modules[first[0]] is not inputs:
            return first
        weight = modules[first[0]]._parameters.get("weight")
        tied = [n for n, m in modules.items() if n not in first and m._parameters.get("weight") is weight]
        return [*first, *tied]

    def init(self, site: Site) -> dict[str, Tensor]:
        index = torch.tensor(self.token_indices, dtype=torch.long, device=site.home)  # (k,)
        vocabulary, width = (site.fan_in, site.fan_out) if site.lookup else (site.fan_out, site.fan_in)
        beyond = [i for i in self.token_indices if i >= vocabulary]
        if beyond:
            raise ValueError(f"{site.name}: token indices {beyond} are beyond its {vocabulary} rows")
        shape = (len(self.token_indices), width)  # (k, width)
        if not self.init_weights:
            return {"rows": site.normal(*shape), "index": index}
        return {"rows": site.computed(shape, lambda: self.base_rows(site, index)), "index": index}

    def base_rows(self, site: Site, index: Tensor) -> Tensor:
        return site.stored_rows(index)

    def delta(self, p: Tensors, site: Site) -> Operator:
        rows = p["rows"]
        change = rows - self.base_rows(site, p["index"]).to(device=rows.device, dtype=rows.dtype)  # (k, width)
        return SelectedRows(
            p["index"], change, site.fan_in if site.lookup else site.fan_out, "in" if site.lookup else "out"
        )

    def combine(self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site) -> dict[str, Tensor]:
        """The base's rows plus the weighted sum of what the adapters change them by."""
        place = {row: i for i, row in enumerate(self.token_indices)}
        index = torch.tensor(self.token_indices, device=parts[0][1]["rows"].device)
        rows = self.base_rows(site, index).to(parts[0][1]["rows"])  # (k, width)
        for (other, p), weight in zip(parts, weights, strict=True):
            where = [place[row] for row in other.token_indices]
            rows[where] += (p["rows"] - self.base_rows(site, p["index"]).to(p["rows"])) * weight
        return {"rows": rows}

    def combined(self, others: Sequence[Self], **options: object) -> Self:
        rows = [i for c in (self, *others) for i in c.token_indices]
        return super().combined(others, **options).replace(token_indices=list(dict.fromkeys(rows)))


@method("TRAINED_BIAS", internal=True)
@dataclass
class TrainedBias(Method):
    """Every bias of the model, as `bias="all"` of another config asks for; adapted layers see to their own."""

    # A bias that is a site of its own, or that of a layer.
    tensors = {"copy": Trained(""), "bias": Trained("bias", name_at=lambda config, site: site.kind.bias)}

    def sites_of(self, model: nn.Module, others: OtherSublayers) -> Collection[str]:
        return [n for n, _ in model.named_parameters() if n == "bias" or n.endswith(".bias")]

    def init(self, site: Site) -> dict[str, Tensor]:
        own = site.bias
        if own is None:
            return {"copy": init_copy(site)}
        return {"bias": site.computed(tuple(own.shape), lambda: own)}

    def combine(self, parts: Sequence[tuple[Self, Tensors]], weights: Sequence[float], site: Site) -> dict[str, Tensor]:
        """The base's bias plus the weighted sum of what the adapters change it by."""
        key = "bias" if "bias" in parts[0][1] else "copy"
        own: Any = site.bias if key == "bias" else site.stored()
        return {key: combine_copies(own, [p[key] for _, p in parts], weights)}

    def delta(self, p: Tensors, site: Site) -> Operator | None:
        return copy_delta(p["copy"], site) if "copy" in p else None

    def shift(self, p: Tensors, site: Site) -> Tensor | None:
        return bias_shift(p, site)
