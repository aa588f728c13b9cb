"""Adapters come and go, are switched, combined and merged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..injection.router import AdapterExpr, adapter_names, as_stack
from ..lifecycle.combine import combine_adapters
from ..lifecycle.detach import delete_adapter, unload_adapters
from ..lifecycle.merge import merge_adapters, unmerge_adapters
from ..methods.base import Method
from ..training.attach import attach_watched
from .calls import Calls
from .persistence import with_base_name

if TYPE_CHECKING:
    from ..serving.slots import Slots


class AdapterControls(Calls):
    """The operations of `PeftModel` on its adapters."""

    def set_adapter(self, adapter_name: AdapterExpr | Sequence[AdapterExpr], inference_mode: bool = False) -> None:
        """Make one adapter, or several stacked in order, the active ones; `Parallel`, `Average` set them side by side.

        Activating does not change what is trained: a fresh adapter is trainable, a loaded one is as
        `is_trainable` said. `inference_mode=True` freezes the named ones as well.

        Raises:
            ValueError: an unknown name; or adapters are merged, or bring full copies of the same module.
        """
        self.runtime.activate(adapter_name)
        if inference_mode:
            self.set_requires_grad(tuple(adapter_names(as_stack(adapter_name))), False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say whether adapters are trained."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.runtime.config_of(name)
            for parameter in self.runtime.parameters(name):
                parameter.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, the base model alone; merged adapters are taken out and put back."""
        router = self.runtime.router
        before, merged = router.enabled, router.merged
        if merged:
            unmerge_adapters(self.runtime)
        router.set(enabled=False)
        try:
            yield
        finally:
            if merged:
                merge_adapters(self.runtime, merged)
            router.set(enabled=before)

    @contextmanager
    def use_adapter(self, adapter_name: AdapterExpr | Sequence[AdapterExpr]) -> Iterator[None]:
        """Within the block and in this thread only, other adapters than the active ones; see `set_adapter`."""
        names = as_stack(adapter_name)
        for name in adapter_names(names):
            self.runtime.config_of(name)
        self.runtime.check_together(names)
        if self.runtime.router.merged:
            raise ValueError("adapters are merged into the base weights; call unmerge_adapter() first")
        self._recall()
        with self.runtime.router.choose(names):
            yield

    def reserve_slots(
        self,
        *,
        max_adapters: int,
        max_rank: int,
        dtype: torch.dtype | None = None,
        target_modules: str | Collection[str] = "all-linear",
        max_rows: int = 256,
    ) -> Slots:
        """Make room for low-rank adapters that are loaded, swapped and switched without recompiling the model.

        They act beside the active adapters, after these. Arguments and errors are those of `veneer.slots.Slots`.
        """
        from ..serving.slots import Slots

        return Slots(
            self.runtime,
            max_adapters=max_adapters,
            max_rank=max_rank,
            dtype=dtype,
            target_modules=target_modules,
            max_rows=max_rows,
        )

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Method,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter. It is trainable unless its config says `inference_mode`, and not active."""
        attach_watched(
            self.runtime,
            adapter_name,
            with_base_name(peft_config, self.get_base_model()),
            trainable=not peft_config.inference_mode,
            autocast=autocast_adapter_dtype,
            meta=low_cpu_mem_usage,
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors."""
        delete_adapter(self.runtime, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted combination of others of the same method. It is frozen, and not active.

        All but the first three are for LoRA. "cat" is exact, and so is "svd" at a rank that suffices. "linear" adds up
        A and B apart, times the square roots of the weights, and with them their mixed products: B_1 A_2 is not in any
        of the adapters, so it is a rough approximation, as in peft, unless there is one adapter. A combination of one
        adapter is always "linear", and exact. Trained biases, `lora_bias` and token rows are added up with their weights.

        Args:
            adapters: names of those to combine.
            weights: one number for each, negative to subtract.
            adapter_name: name of the new one.
            combination_type: "svd", "linear", "cat", "ties", "dare_ties", "dare_linear" or "magnitude_prune", which act
                on A and on B; the last four with "_svd" act on the changes of the weight and keep their best low-rank part.
            svd_rank: rank of the result of the "svd" kinds; None for the largest among the adapters.
            svd_clamp: quantile of the entries of both factors, at which they are cut off.
            svd_full_matrices: accepted; the factors that are kept are the same.
            svd_driver: cuSOLVER's algorithm, see `torch.linalg.svd`.
            density: fraction of the entries that the pruning kinds keep.
            majority_sign_method: "total" or "frequency", how the "ties" kinds elect a sign.

        Raises:
            ValueError: a method without weighted combinations, adapters that do not go together, bad names or values.
        """
        given = {
            "combination_type": (combination_type, "svd"),
            "svd_rank": (svd_rank, None),
            "svd_clamp": (svd_clamp, None),
            "svd_full_matrices": (svd_full_matrices, True),
            "svd_driver": (svd_driver, None),
            "density": (density, None),
            "majority_sign_method": (majority_sign_method, "total"),
        }
        chosen = {name: value for name, (value, default) in given.items() if value != default}
        combine_adapters(self.runtime, adapters, weights, adapter_name, **chosen)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Bake adapters into the base weights, in float32 and rounded once; `unmerge_adapter` undoes it exactly.

        Args:
            adapter_names: which, in stacking order; None for the active ones.
            safe_merge: raise, changing nothing, if a merged weight is not finite.
        """
        merge_adapters(self.runtime, self._names(adapter_names), check=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put back the exact bits of the base weights."""
        unmerge_adapters(self.runtime)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Bake adapters in for good and return the plain base model.

        Args:
            progressbar: accepted.
            safe_merge: refuse adapters that give weights which are not finite.
            adapter_names: which; None merges the active ones.
            dequantize: of a quantized base, merge into the dequantized weights, in the dtype in which each layer
                computes, rather than quantize the merged ones again. `export_dense` also writes them.
        """
        if dequantize:
            from ..export.dense import merge_dense

            base = self.get_base_model()
            merge_dense(base, self._names(adapter_names), check=safe_merge)
            return base
        return unload_adapters(self.runtime, merge=self._names(adapter_names), check=safe_merge)

    def unload(self) -> nn.Module:
        """Take all adapters off and return the base model as it was."""
        return unload_adapters(self.runtime)

    def _names(self, adapter_names: Sequence[AdapterExpr] | None) -> tuple[AdapterExpr, ...]:
        return self.runtime.router.chosen if adapter_names is None else as_stack(adapter_names)
