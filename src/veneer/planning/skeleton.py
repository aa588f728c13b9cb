"""Models without weights: from a folder, an embedded model, or the table of shapes in models.toml."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.embedded import EMBEDDED, locate_model
from ..targets.suggest import suggest

AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}


@functools.cache
def load_table() -> dict[str, Any]:
    """models.toml."""
    with open(Path(__file__).with_name("models.toml"), "rb") as file:
        return tomllib.load(file)


def find_entry(name: str) -> dict[str, Any] | None:
    """The table's entry for a name or hub id, whatever its case."""
    key = name.lower()
    content: dict[str, Any]
    for entry, content in load_table().items():
        if key == entry or key in (hub.lower() for hub in content["hub"]):
            return content
    return None


def load_configuration(name: str) -> tuple[Any, bool, str]:
    """A model's config, whether its head is untied against transformers' will, and where the config comes from.

    Raises:
        ValueError: an unknown name, or a hub id that cannot be reached.
    """
    import transformers

    content = find_entry(name)
    if content is not None and not Path(name).is_dir():
        made = transformers.AutoConfig.for_model(content["model_type"], **content["config"])
        return made, bool(content.get("untied")), f"shapes of {content['hub'][0]}, shipped with veneer"
    names = [*load_table(), *EMBEDDED]
    if not Path(name).is_dir() and "/" not in name and name.lower() not in EMBEDDED:
        raise ValueError(
            f"model {name!r}: no such folder, and no name that is known{suggest(name.lower(), names)}; give a folder with a "
            f"config.json, a hub id (owner/name), or one of {', '.join(names)}"
        )
    where = locate_model(name)
    try:
        return transformers.AutoConfig.from_pretrained(where), False, "its own config.json"
    except (OSError, ValueError) as error:
        hint = suggest(name.lower().rpartition("/")[2], names)
        raise ValueError(
            f"model {name!r}: its config.json cannot be read ({str(error).splitlines()[0]}){hint}; give a folder with a "
            f"config.json, or one of the shapes that are shipped: {', '.join(names)}"
        ) from error


def task_of(config: Any) -> str:
    """What a model is for, where the user does not say."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    architectures = getattr(config, "architectures", None) or ["ForCausalLM"]
    from transformers.models.auto import modeling_auto

    masked = config.model_type in ("bert", "roberta", "distilbert", "electra", "albert", "deberta", "deberta-v2")
    speaks = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not masked
    return "causal-lm" if speaks or any("CausalLM" in a for a in architectures) else "classification"


def build_model(config: Any, task: str, dtype: torch.dtype, attention: str | None, untied: bool) -> nn.Module:
    """The model on the meta device.

    Raises:
        ValueError: an architecture that has no such task, or no such attention.
    """
    import transformers

    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model: Any = getattr(transformers, AUTO[task]).from_config(config, dtype=dtype, **options)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{config.model_type} cannot be built for {task}: {str(error).splitlines()[0]}; tasks are {', '.join(AUTO)}"
        ) from error
    if untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    for name in ("pad_token_id", "decoder_start_token_id"):  # any will do
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, 0)
    built: nn.Module = model
    return built
