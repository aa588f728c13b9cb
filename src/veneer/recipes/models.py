"""Loading base models and their tokenizers, with the commands' messages."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from ..files.embedded import locate_model
from .errors import InputError

QUANTIZED = ("int8", "nf4", "fp4")


def make_quantization(storage: str, dtype: str) -> Any:
    """Transformers' config to store linear layers in 8 or 4 bits with bitsandbytes.

    4 bits are those of Dettmers et al. 2023, arxiv.org/abs/2305.14314 (QLoRA), with the scales quantized too.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--quantize {storage} needs bitsandbytes; run: pip install 'veneer[quantized]'")
    # Its int8 says in each layer and call that it computes in float16, whatever the dtype of the model.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if storage == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def find_model(name: str) -> str:
    """Return what `from_pretrained` takes for a model's name.

    Raises:
        InputError: as `locate_model` raises ValueError.
    """
    try:
        return locate_model(name)
    except ValueError as error:
        raise InputError(str(error)) from error


def load_model(name: str, auto: str, task: str, dtype: str, quantize: str | None, **options: object) -> Any:
    """Load a base model by transformers' class `auto`, quantized or not; `task` is for the message.

    Raises:
        InputError: the model is not found, or is not one for this class.
    """
    import torch
    import transformers

    where = find_model(name)
    if quantize is not None:
        options["quantization_config"] = make_quantization(quantize, dtype)
    transformers.utils.logging.disable_progress_bar()  # the commands show their own
    try:
        return getattr(transformers, auto).from_pretrained(where, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be loaded for {task}: {error}") from error


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer, with a padding token.

    Raises:
        InputError: the model is not found, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    where = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} has no tokenizer that can be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
