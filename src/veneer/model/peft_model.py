"""The face people use: `get_peft_model`, `PeftModel` and the functions around them, with peft's names."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..files import adapter_files, adapterhub, fused_layers, renamed_modules
from ..files import state_dict as files_state_dict
from ..injection import checkpointing
from ..injection.router import AdapterExpr, Rows, adapter_names, as_stack
from ..io import atomic_write, locate
from ..lifecycle.adapters import Runtime
from ..lifecycle.combine import combine_adapters
from ..lifecycle.detach import delete_adapter, unload_adapters
from ..lifecycle.keys import PREFIX
from ..lifecycle.load_report import AdapterLoadError, LoadReport
from ..lifecycle.merge import merge_adapters, unmerge_adapters
from ..methods.base import Method, PeftConfig
from ..methods.registry import registry
from ..targets.suggest import suggest
from ..training.watch import attach_watched
from .status import get_layer_status, get_model_status

if TYPE_CHECKING:
    from ..serving.slots import Slots
    from .status import TunerLayerStatus, TunerModelStatus


class BaseTuner(nn.Module):
    """Holds the adapted base model as `.model`, so that paths read `base_model.model...` as in peft."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(nn.Module):
    """A base model with adapters on it.

    The base model's layers are adapted in place; this is a thin facade with the operations on adapters. Attributes
    it does not have are looked up on the base model.

    Args:
        model: the base model; its parameters are frozen.
        peft_config: the method; copied, so changing it later does not change the adapter.
        adapter_name: name of the adapter, without '/', '.' and ':'.
        autocast_adapter_dtype: keep adapter parameters in float32 where the base is in float16 or bfloat16.
        low_cpu_mem_usage: make the adapter on the meta device, to be filled by a file.

    Raises:
        ValueError: targets that do not exist, a hyper-parameter that does not fit a layer, a name that is taken.
        RuntimeError: the model is sharded already.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Method,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self._wrap(model)
        attach_watched(
            self.runtime,
            adapter_name,
            peft_config,
            trainable=not peft_config.inference_mode,
            autocast=autocast_adapter_dtype,
            meta=low_cpu_mem_usage,
        )
        self.runtime.activate(adapter_name)

    def _wrap(self, model: nn.Module) -> None:
        if isinstance(model, PeftModel):
            raise ValueError("this is a PeftModel already; add another adapter with model.add_adapter(name, config)")
        self.base_model = BaseTuner(model)
        self.__dict__["_runtime"] = Runtime.ensure(model)
        self.__class__ = facade_of(type(model))
        if checkpoints(model) and hasattr(model, "enable_input_require_grads"):
            cast(
                Any, model
            ).enable_input_require_grads()  # else a checkpointed block sees no input that needs a gradient

    # What it holds.

    @property
    def runtime(self) -> Runtime:
        return self.__dict__["_runtime"]  # type: ignore[no-any-return]

    def get_base_model(self) -> nn.Module:
        """The base model, with its adapters on it."""
        model: nn.Module = self.base_model.model
        return model

    @property
    def peft_config(self) -> dict[str, Method]:
        """Adapter name -> its config."""
        return self.runtime.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters in the order in which they are stacked."""
        return list(self.runtime.router.active)

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> Method:
        return self.peft_config[self.runtime.router.active[0]]

    @property
    def peft_type(self) -> str | None:
        return self.active_peft_config.peft_type

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self.get_base_model()),), self.__dict__

    # Running.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with the active adapters.

        Takes two arguments more: `adapter_names`, the adapter of each row ("__base__" for none), and `task_ids`, the
        task of each row (batch,) for adapters that hold several.
        """
        with self._by_row(args, kwargs):
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._checkpointed()
            return self.base_model.model(*args, **kwargs)

    def _checkpointed(self) -> None:
        """See that gradient checkpointing passes gradients on, which a Trainer may have turned on after attaching."""
        root = self.get_base_model()
        if "_carrier" not in self.__dict__:
            self.__dict__["_carrier"] = checkpointing.carrier(root)
        block = self.__dict__["_carrier"]
        if block is not None and block.gradient_checkpointing:
            checkpointing.enter(root, block)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`, with the active adapters; takes `adapter_names` and `task_ids` as the forward."""
        with self._by_row(args, kwargs), self.runtime.router.hold(decoding={}):
            return cast(Any, self.get_base_model()).generate(*args, **kwargs)

    def _by_row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Hold what is said of single rows, and take it out of the call."""
        if "adapter_names" not in kwargs and "task_ids" not in kwargs:
            return nullcontext()
        names, tasks = kwargs.pop("adapter_names", None), kwargs.pop("task_ids", None)
        router = self.runtime.router
        if tasks is not None:
            tasks = torch.as_tensor(tasks)
            if tasks.is_floating_point() or tasks.dtype == torch.bool:
                raise ValueError(f"task_ids are {tasks.dtype}; give whole numbers, one for each row")
        batch = rows_of(args, kwargs)
        for given in (names, tasks):
            if given is not None and batch is not None and len(given) != batch:
                raise ValueError(
                    f"adapter_names or task_ids are for {len(given)} rows, but the batch has {batch}; give one for each row"
                )
        if names is not None:
            for name in dict.fromkeys(names):
                if name != "__base__":
                    self.runtime.config_of(name)
            if router.merged:
                raise ValueError(
                    "adapter_names: adapters are merged into the base weights; call unmerge_adapter() first"
                )
            self._recall()
        return router.hold(rows=None if names is None else Rows(names), tasks=tasks)

    def _recall(self) -> None:
        """See that what is chosen for one call holds where gradient checkpointing runs a block again."""
        if self.training and torch.is_grad_enabled():
            checkpointing.recall(self.get_base_model(), self.runtime.router)

    # Switching.

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

    # Adapters come and go.

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

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        strict: bool = True,
        **kwargs: Any,
    ) -> LoadReport:
        """Load a saved adapter under a name of its own. It is not made active. AdapterHub's folders are read as well.

        Where an adapter of that name and with the same config is there, it takes the file's values, in place, as when
        Trainer goes back to its best checkpoint.

        Args:
            model_id: folder or hub id.
            adapter_name: name it gets here.
            is_trainable: whether its parameters are trained.
            torch_device: accepted; tensors go where their layer computes.
            autocast_adapter_dtype: keep its parameters in float32 where the base is in half precision.
            ephemeral_gpu_offload: accepted; Veneer computes starting values where the weight is.
            low_cpu_mem_usage: accepted; nothing is initialised that the file brings.
            strict: whether keys that do not fit raise; False warns with the same report.
            **kwargs: `subfolder`, `revision`, `token`, `cache_dir` and other arguments of the hub.

        Raises:
            ValueError: no such adapter, a damaged file, a config that cannot be honoured; the name is another adapter's.
            AdapterLoadError: keys are missing, unexpected or of another shape; nothing was changed.
        """
        config = kwargs.pop("config", None)
        fusion = config is None and adapterhub.holds_fusion(model_id)
        values, path = locate.read_config(model_id, **kwargs) if config is None and not fusion else ({}, "")
        if fusion or (config is None and adapterhub.recognises(values)):
            return adapterhub.load(
                self,
                model_id,
                adapter_name,
                is_trainable=is_trainable,
                strict=strict,
                autocast_adapter_dtype=autocast_adapter_dtype,
                **kwargs,
            )
        if config is None:
            config = PeftConfig.from_dict(values, where=path)
        config = config.replace(inference_mode=not is_trainable)
        file = locate.weights_path(model_id, **kwargs)
        tensors: Mapping[str, Tensor] = locate.read_tensors(file)
        if values:
            locate.check_config(values, file)
        adapter_files.check_base(self.runtime, file, strict=strict)
        if adapter_name in self.peft_config and alike(self.peft_config[adapter_name], config):
            return files_state_dict.set_peft_model_state_dict(self, tensors, adapter_name, strict=strict)
        given: dict[str, Any] = {"trainable": is_trainable, "autocast": autocast_adapter_dtype}
        try:
            return attach_watched(self.runtime, adapter_name, config, tensors=tensors, **given)
        except ValueError as error:
            config, tensors, said = fused_layers.refitted(self.runtime, config, tensors)
            if not said:
                tensors, moved = renamed_modules.translated(tensors, self.get_base_model())
                said = "".join(
                    f"{len(moved)} modules have other paths here, {old} is {new}" for old, new in [*moved.items()][:1]
                )
            if not said and (strict or not isinstance(error, AdapterLoadError)):
                raise
        if said:
            warnings.warn(
                f"{file} is of a layout of another release of transformers: {said}; saved again, it has those of this one",
                stacklevel=3,
            )
        return attach_watched(self.runtime, adapter_name, config, tensors=tensors, strict=strict, **given)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Method | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        strict: bool = True,
        adapters: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load a saved adapter, or several, onto a base model.

        Arguments and errors are those of `load_adapter`, and:

        Args:
            adapters: "all" loads every adapter that the folder holds and makes those active that were when it was
                saved; a list of names loads these, and makes them active in that order. None loads the one adapter
                that lies in the folder itself, as `adapter_name`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._wrap(model)
        before = set(made.peft_config)
        if adapters is not None:
            try:
                made._load_set(model_id, adapters, is_trainable, autocast_adapter_dtype, strict, kwargs)
            except BaseException:
                if made.peft_config and not before:
                    unload_adapters(made.runtime)
                for name in [n for n in made.peft_config if n not in before]:
                    delete_adapter(made.runtime, name)
                raise
            return made
        if config is not None:
            kwargs["config"] = config
        made.load_adapter(
            model_id, adapter_name, is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, strict=strict, **kwargs
        )
        made.runtime.activate(adapter_name)
        if not is_trainable:
            made.eval()
        return made

    def _load_set(
        self,
        folder: str | os.PathLike[str],
        wanted: str | Sequence[str],
        is_trainable: bool,
        autocast: bool,
        strict: bool,
        hub: dict[str, Any],
    ) -> None:
        names, active = adapter_files.load_set(folder, **hub)
        if wanted != "all":
            active = [wanted] if isinstance(wanted, str) else list(wanted)
            for name in active:
                if name not in names:
                    raise ValueError(
                        f"adapters={wanted!r}: {os.fspath(folder)!r} holds {', '.join(map(repr, names))}{suggest(name, names)}"
                    )
            names = active
        for name in names:
            where = {} if name == "default" else {"subfolder": name}
            self.load_adapter(
                folder, name, is_trainable, autocast_adapter_dtype=autocast, strict=strict, **{**hub, **where}
            )
        if active:
            self.runtime.activate(active)
        if not is_trainable:
            self.eval()

    # Merging.

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

    # Counting.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trained and of all parameters; tied ones count once."""
        trained = total = 0
        for parameter in self.parameters():
            n = getattr(parameter, "ds_numel", 0) or parameter.numel()  # under ZeRO-3 a shard is empty
            total += n
            trained += n if parameter.requires_grad else 0
        return trained, total

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    # Saving.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters as `adapter_config.json` and `adapter_model.safetensors`, atomically.

        Args:
            save_directory: the adapter named "default" goes here, others into a folder of their name below.
            safe_serialization: must be True; Veneer writes safetensors only.
            selected_adapters: which; None for all.
            save_embedding_layers: True adds the embeddings, "auto" where the vocabulary was resized.
            is_main_process: whether this process writes. Where parameters are sharded (FSDP2, ZeRO-3) every process
                calls this: all of them gather, rank 0 writes, the others wait.

        Raises:
            ValueError: `safe_serialization` is False, an unknown name, or a tensor without data.
        """
        if not safe_serialization:
            raise ValueError(
                "save_pretrained(safe_serialization=False): pickles can run code; Veneer writes safetensors"
            )
        if kwargs.get("path_initial_model_for_weight_conversion") is not None:
            raise ValueError(
                "save_pretrained(path_initial_model_for_weight_conversion=...): not needed; the base model was not "
                "changed by the starting values, and the file loads onto the untouched base"
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self.runtime.config_of(name)
        for name in names:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            fields = {}
            if self.peft_config[name].base_model_name_or_path is None:
                fields["base_model_name_or_path"] = base_name(self.get_base_model())
            adapter_files.save_adapter(
                self.runtime, name, folder, embeddings=save_embedding_layers, write=is_main_process, **fields
            )
        listed = selected_adapters is None and (Path(save_directory) / locate.SET_NAME).exists()  # of an earlier save
        if (len(names) > 1 or listed) and is_main_process:
            adapter_files.save_set(names, [n for n in self.active_adapters if n in names], save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """See that the README.md in a folder says what it is an adapter for, as the hub wants; Trainer calls it.

        What the card says besides, such as the figures that Trainer writes, stays.
        """
        from huggingface_hub import ModelCard

        path = Path(output_dir) / "README.md"
        config = self.active_peft_config if self.active_adapters else next(iter(self.peft_config.values()))
        config = with_base_name(config, self.get_base_model())
        own: Any = ModelCard(adapter_files.model_card(config))
        card: Any = ModelCard.load(path) if path.is_file() else own
        card.data.library_name = own.data.library_name
        card.data.tags = sorted({*(card.data.tags or []), *(own.data.tags or [])})
        if own.data.base_model is not None:
            card.data.base_model = own.data.base_model
        atomic_write.save_text(path, str(card))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Save into a temporary folder and upload it to the hub as `repo_id`; returns the hub's commit."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            api = HfApi(token=token)
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload adapter",
                revision=revision,
                create_pr=create_pr,
            )

    # Looking.

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `veneer.convert_to_lora` can turn an adapter into a LoRA."""
        from ..export.to_lora import convertible

        return convertible(self.runtime, adapter_name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)


_FACADES: dict[type[nn.Module], type[PeftModel]] = {}


def alike(one: Method, other: Method) -> bool:
    """Whether two configs describe the same adapter, wherever they were saved."""
    here, there = ({k: v for k, v in c.to_dict().items() if k not in locate.APART} for c in (one, other))
    return here == there


def facade_of(base: type[nn.Module]) -> type[PeftModel]:
    """`PeftModel` with the signature of `base.forward`, named after its task as in peft.

    transformers' Trainer reads a model's inputs and labels off the signature of its class, and drops every column of
    the data that it does not find there.
    """
    if base in _FACADES:
        return _FACADES[base]

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return PeftModel.forward(self, *args, **kwargs)

    forward.__doc__ = PeftModel.forward.__doc__
    forward.__signature__ = with_inputs_of_methods(inspect.signature(base.forward))  # type: ignore[attr-defined]
    task = base.__name__.partition("For")[2]
    name = f"PeftModelFor{task}" if task else "PeftModel"
    _FACADES[base] = type(name, (PeftModel,), {"forward": forward, "__module__": __name__})
    return _FACADES[base]


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Rows of the batch that a call is given, or None where it does not tell."""
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("inputs"), *args[:1]):
        if isinstance(given, Tensor) and given.ndim > 1:
            return int(given.shape[0])
    return None


def with_inputs_of_methods(signature: inspect.Signature) -> inspect.Signature:
    """A forward's signature with what single methods take besides: `task_ids`, and inputs of their objectives."""
    extra = dict.fromkeys(["task_ids", *(name for cls in registry().values() for name in cls.extra_inputs)])
    own = list(signature.parameters.values())
    new = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
        for n in extra
        if n not in signature.parameters
    ]
    rest = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in own if p not in rest), *new, *rest])


def _rebuild(base: type[nn.Module]) -> PeftModel:
    cls = facade_of(base)
    return cls.__new__(cls)


def checkpoints(model: nn.Module) -> bool:
    """Whether a transformers model has gradient checkpointing on."""
    return any(m.__dict__.get("gradient_checkpointing", False) for m in model.modules())


def base_name(model: nn.Module) -> str | None:
    """Hub id or folder a base model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or model.__dict__.get("name_or_path")
    return str(name) if name else None


def with_base_name(config: Method, model: nn.Module) -> Method:
    """The config with the base model's name filled in, where it is known and missing."""
    if config.base_model_name_or_path is not None:
        return config
    named: Method = config.replace(base_model_name_or_path=base_name(model))
    return named


def get_peft_model(
    model: nn.Module,
    peft_config: Method,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a fresh adapter on a base model and return both as a `PeftModel`.

    Args:
        model: any `nn.Module`; its parameters are frozen and its layers adapted in place.
        peft_config: the method and its hyper-parameters.
        adapter_name: name of the adapter.
        mixed: accepted; adapters of different methods can always share a model.
        autocast_adapter_dtype: keep adapter parameters in float32 where the base is in half precision.
        revision: revision of the base model, kept in the config.
        low_cpu_mem_usage: make the adapter on the meta device, to be filled by a file.

    Raises:
        TypeError: `peft_config` is no config.
        ValueError: see `PeftModel`.
    """
    if not isinstance(peft_config, Method):
        raise TypeError(
            f"get_peft_model: peft_config is a {type(peft_config).__name__}; pass a config such as LoraConfig(r=8)"
        )
    config = with_base_name(peft_config, model)
    if revision is not None:
        config = config.replace(revision=revision)
    return PeftModel(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: Method,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on a model in place and return the model itself, without a `PeftModel` around it.

    Args:
        peft_config: the method.
        model: any `nn.Module`.
        adapter_name: name of the adapter; it becomes the active one.
        low_cpu_mem_usage: make its tensors on the meta device.
        state_dict: values for its tensors, by key with or without `base_model.model.`.
    """
    runtime = Runtime.ensure(model)
    prefix = PREFIX if state_dict and any(k.startswith(PREFIX) for k in state_dict) else ""
    attach_watched(
        runtime,
        adapter_name,
        peft_config,
        tensors=state_dict,
        prefix=prefix,
        trainable=not peft_config.inference_mode,
        meta=low_cpu_mem_usage,
    )
    runtime.activate(adapter_name)
    return model
