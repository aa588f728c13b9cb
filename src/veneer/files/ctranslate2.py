"""Whisper models in CTranslate2's files, as transformers' models."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

DTYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}  # by the number in the file


def read(path: Path) -> dict[str, Any]:
    """The variables of a model.bin of version 6, as numpy arrays by name; aliases are entries too.

    Raises:
        ValueError: another version, or a file that ends early.
    """
    import numpy as np

    data, at = path.read_bytes(), 0

    def numbers(form: str) -> tuple[Any, ...]:
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        nonlocal at
        (n,) = numbers("H")
        at += n
        return data[at - n : at - 1].decode()  # without the closing zero

    try:
        (version,) = numbers("I")
        if version != 6:
            raise ValueError(f"{path}: CTranslate2 files of version {version} are not read, only those of version 6")
        text(), numbers("I")  # the kind of model and its revision
        found: dict[str, Any] = {}
        for _ in range(numbers("I")[0]):
            name = text()
            shape = numbers(f"{numbers('B')[0]}I")
            kind, size = numbers("BI")
            found[name] = np.frombuffer(data[at : at + size], DTYPES[kind]).reshape(shape)
            at += size
        for _ in range(numbers("I")[0]):
            alias, name = text(), text()
            found[alias] = found[name]
    except struct.error as error:
        raise ValueError(f"{path} ends early") from error
    return found


def whisper_names(found: dict[str, Any]) -> dict[str, Any]:
    """CTranslate2's variables under transformers' names: (out, in) weights stay as they are, fused ones are split."""
    import numpy as np

    made: dict[str, Any] = {}

    def put(name: str, *values: object) -> None:
        for key, value in zip(("weight", "bias"), values, strict=False):
            made[f"model.{name}.{key}"] = np.asarray(value, np.float32)

    def layer_norm(source: str, target: str) -> None:
        put(target, found[f"{source}/gamma"], found[f"{source}/beta"])

    def linear(source: str, target: str) -> None:
        put(target, found[f"{source}/weight"], found[f"{source}/bias"])

    def fused(source: str, target: str, names: tuple[str, ...]) -> None:
        weight, bias = found[f"{source}/weight"], found[f"{source}/bias"]  # (k * d, d), (k * d,)
        for name, w, b in zip(names, np.split(weight, len(names)), np.split(bias, len(names)), strict=True):
            put(f"{target}.{name}", w, *([] if name == "k_proj" else [b]))  # Whisper's keys have no bias

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    put("decoder.embed_tokens", found["decoder/embeddings/weight"])
    for side in ("encoder", "decoder"):
        put(f"{side}.embed_positions", found[f"{side}/position_encodings/encodings"])
        layer_norm(f"{side}/layer_norm", f"{side}.layer_norm")
        own = "self_attention"
        for i in range(layers(found, side)):
            source, target = f"{side}/layer_{i}", f"{side}.layers.{i}"
            fused(f"{source}/{own}/linear_0", f"{target}.self_attn", ("q_proj", "k_proj", "v_proj"))
            linear(f"{source}/{own}/linear_1", f"{target}.self_attn.out_proj")
            layer_norm(f"{source}/{own}/layer_norm", f"{target}.self_attn_layer_norm")
            if side == "decoder":
                fused(f"{source}/attention/linear_0", f"{target}.encoder_attn", ("q_proj",))
                fused(f"{source}/attention/linear_1", f"{target}.encoder_attn", ("k_proj", "v_proj"))
                linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
                layer_norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            layer_norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    return made


def layers(found: dict[str, Any], side: str) -> int:
    return len(
        {n.split("/")[1] for n in found if n.startswith(f"{side}/layer_") and "layer_norm" not in n.split("/")[1]}
    )


def whisper(source: Path, target: Path) -> None:
    """Write the Whisper of `source/model` as a folder that transformers loads: model, tokenizer, feature extractor."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder = source / "model"
    given, found = json.loads((folder / "config.json").read_text("utf-8")), read(folder / "model.bin")
    vocabulary, width = found["decoder/embeddings/weight"].shape
    mels = found["encoder/conv1/weight"].shape[1]  # (d, mels, 3)
    feed = found["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    end, start = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|startoftranscript|>"))
    silent = {"suppress_tokens": given["suppress_ids"], "begin_suppress_tokens": given["suppress_ids_begin"]}
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers(found, "encoder"),
        decoder_layers=layers(found, "decoder"),
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=feed,
        decoder_ffn_dim=feed,
        max_source_positions=found["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=found["decoder/position_encodings/encodings"].shape[0],
        **ids,
    )
    model = WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(value) for name, value in whisper_names(found).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]  # tied
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(
        **ids,
        **silent,
        max_length=config.max_target_positions,
        is_multilingual=False,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        alignment_heads=given["alignment_heads"],
        return_timestamps=False,
    )
    model.save_pretrained(target)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=mels), tokenizer).save_pretrained(target)
