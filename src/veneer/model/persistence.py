"""Adapters are loaded and saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..files import adapter_files
from ..files import state_dict as files_state_dict
from ..io import atomic_write, locate
from ..lifecycle.load_report import LoadReport
from ..methods.base import Method
from ..targets.suggest import suggest
from ..training.attach import attach_watched
from .facade import ModelFacade

if TYPE_CHECKING:
    pass


class AdapterPersistence(ModelFacade):
    """The files of `PeftModel`."""

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
        from ..files import formats

        source = formats.open_source(model_id, kwargs.pop("config", None), kwargs)
        found = formats.read_adapter(source, self.runtime, strict=strict)
        config = found.config.replace(inference_mode=not is_trainable)
        if adapter_name in self.peft_config and same_config(self.peft_config[adapter_name], config):
            return files_state_dict.set_peft_model_state_dict(self, found.tensors, adapter_name, strict=strict)
        report: LoadReport = attach_watched(
            self.runtime,
            adapter_name,
            config,
            tensors=found.tensors,
            strict=strict,
            trainable=is_trainable,
            autocast=autocast_adapter_dtype,
        )
        if found.note:
            warnings.warn(found.note, stacklevel=3)
        return report

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


def same_config(one: Method, other: Method) -> bool:
    """Whether two configs describe the same adapter, wherever they were saved."""
    here, there = ({k: v for k, v in c.to_dict().items() if k not in locate.APART} for c in (one, other))
    return here == there


def base_name(model: nn.Module) -> str | None:
    """Hub id or folder a base model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or model.__dict__.get("name_or_path")
    return str(name) if name else None


def with_base_name(config: Method, model: nn.Module) -> Method:
    """The config with the base model's name filled in, where it is known and missing."""
    if config.base_model_name_or_path is not None:
        return config
    return config.replace(base_model_name_or_path=base_name(model))
