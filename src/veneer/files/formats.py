"""Formats of adapter files: each recognises its own before anything is changed, and reads it for the model that is here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..io import locate
from ..lifecycle.adapters import Runtime
from ..methods.base import Method, PeftConfig
from . import adapter_files, adapterhub, fused_layers, renamed_modules


@dataclass(frozen=True)
class Source:
    """Where an adapter lies.

    Attributes:
        where: folder or hub id.
        hub: `subfolder`, `revision`, `token`, `cache_dir` and other arguments of the hub.
        config: given by the caller in place of the file's.
        values: the content of `adapter_config.json`; empty if `config` is given or there is none.
        path: of that file, for messages.
    """

    where: str | os.PathLike[str]
    hub: dict[str, Any] = field(default_factory=dict)
    config: Method | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter as it can be attached here.

    Attributes:
        config: its method.
        tensors: by the keys that they have in a file of this model.
        note: what was changed to make it fit this model; "" for nothing.
    """

    config: Method
    tensors: Mapping[str, Tensor]
    note: str = ""


class Format(Protocol):
    """One format."""

    def recognises(self, source: Source) -> bool:
        """Whether the files are of this format."""

    def read(self, source: Source, runtime: Runtime, *, strict: bool) -> ReadAdapter:
        """Read the files; nothing is attached.

        Raises:
            ValueError: a damaged file, or a config that cannot be honoured.
        """


class AdapterHubFormat:
    """The folders of AdapterHub's library: a bottleneck adapter, or a fusion of several."""

    def recognises(self, source: Source) -> bool:
        return source.config is None and (adapterhub.holds_fusion(source.where) or adapterhub.recognises(source.values))

    def read(self, source: Source, runtime: Runtime, *, strict: bool) -> ReadAdapter:
        found = adapterhub.read(runtime, source.where, **source.hub)
        return ReadAdapter(found.config, found.tensors)


class PeftFormat:
    """peft's folders, which are Veneer's own; also of other releases of transformers, with other modules."""

    def recognises(self, source: Source) -> bool:
        return True

    def read(self, source: Source, runtime: Runtime, *, strict: bool) -> ReadAdapter:
        config = source.config or PeftConfig.from_dict(source.values, where=source.path)
        file = locate.weights_path(source.where, **source.hub)
        tensors = locate.read_tensors(file)
        if source.values:
            locate.check_config(source.values, file)
        adapter_files.check_base(runtime, file, strict=strict)
        found = fit_to_model(runtime, config, tensors)
        if not found.note:
            return found
        note = f"{file} is of a layout of another release of transformers: {found.note}; saved again, it has those of this one"
        return ReadAdapter(found.config, found.tensors, note)


FORMATS: tuple[Format, ...] = (AdapterHubFormat(), PeftFormat())  # the first that recognises the files reads them


def open_source(where: str | os.PathLike[str], config: Method | None, hub: Mapping[str, Any]) -> Source:
    """Find an adapter's files and read what says of which format they are.

    Raises:
        ValueError: there is no adapter.
    """
    if config is not None or adapterhub.holds_fusion(where):
        return Source(where, {**hub}, config)
    values, path = locate.read_config(where, **hub)
    return Source(where, {**hub}, None, values, str(path))


def read_adapter(source: Source, runtime: Runtime, *, strict: bool = True) -> ReadAdapter:
    """Read an adapter by the first format that recognises it."""
    found = next(one for one in FORMATS if one.recognises(source))
    return found.read(source, runtime, strict=strict)


def fit_to_model(runtime: Runtime, config: Method, tensors: Mapping[str, Tensor]) -> ReadAdapter:
    """Bring a file's tensors to the modules of this model, if they had other paths or were fused otherwise.

    Whether they do is seen from the keys: a path that no module or parameter has here is another layout's.

    Raises:
        ValueError: layers that would fit, with settings that are not the same on fused ones (DoRA, biases).
    """
    strange = renamed_modules.strange_paths(tensors, runtime.root)
    if not strange:
        return ReadAdapter(config, tensors)
    renamed, moved = renamed_modules.translate_keys(tensors, runtime.root, strange)
    if len(moved) < len(strange):  # some are layers that are fused here, or apart
        refit, fitted, note = fused_layers.refit_fused(runtime, config, tensors)
        if note:
            return ReadAdapter(refit, fitted, note)
    if not moved:
        return ReadAdapter(config, tensors)
    old, new = next(iter(moved.items()))
    note = f"{len(moved)} modules have other paths here, {old} is {new}"
    return ReadAdapter(renamed_modules.with_new_names(config, moved), renamed, note)
