"""The formats that programs accept of an adapter, with the sources of these facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..peft.method_names import NOT_INJECTED, PEFT_METHODS
from .doctor_files import MAGNITUDE

_VLLM = "https://docs.vllm.ai/en/stable/api/vllm/lora"
_MEASURED = "measured with transformers 5.24, peft 0.21.2 and diffusers 0.42.1"


@dataclass(frozen=True)
class Accepts:
    """The parts of an adapter that one program reads."""

    methods: frozenset[str]  # values of `peft_type`
    sources: Mapping[str, str]  # attribute -> source of its value
    ranks: tuple[int, ...] | None = None  # sizes that the program reserves; None for any rank
    copies: bool = True  # full copies of modules (`modules_to_save`)
    rows: bool = True  # trained token rows
    biases: bool = True  # trained biases of layers
    lora_bias: bool = True  # biases on B
    dora: bool = True  # magnitudes
    computed_start: bool = True  # starts computed from the base weight, such as PiSSA, that the file does not hold
    patterns: bool = True  # `rank_pattern` and `alpha_pattern`; else there is one scale for all layers
    scales: bool = True  # the config's scale
    convolutions: bool = True  # factors of more than two dimensions
    embeddings: bool = True  # factors of embeddings
    parameters: bool = True  # `target_parameters`
    prefix: bool = False  # keys must begin with `base_model.model.`
    adapter_in_key: bool = False  # keys may contain the adapter's name
    magnitude: tuple[str, ...] = (MAGNITUDE, f"{MAGNITUDE}.weight")  # endings of a magnitude's key

    def source(self, name: str) -> str:
        """The source of one fact; "" for the program's general one."""
        return self.sources.get(name, self.sources[""])


TARGETS: dict[str, Accepts] = {
    "vllm": Accepts(
        methods=frozenset({"LORA"}),
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        copies=False,
        rows=False,
        biases=False,
        lora_bias=False,
        dora=False,
        computed_start=False,
        patterns=False,
        convolutions=False,
        sources={
            "": f"{_VLLM}/peft_helper/ (PEFTHelper)",
            "ranks": "https://docs.vllm.ai/en/stable/api/vllm/config/lora/ (MaxLoRARanks)",
            "rows": f"{_VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "biases": f"{_VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "lora_bias": f"{_VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "adapter_in_key": f"{_VLLM}/utils/ (parse_fine_tuned_lora_name)",
            "copies": "https://github.com/vllm-project/vllm/issues/9280",
            "dora": "https://github.com/vllm-project/vllm/issues/6983",
            "convolutions": f"{_VLLM}/utils/ (get_supported_lora_modules)",
            "embeddings": f"{_VLLM}/utils/ (get_supported_lora_modules), {_VLLM}/lora_model/",
            "parameters": f"{_VLLM}/lora_model/ (from_local_checkpoint)",
            "dtype": "--dtype of vllm serve",
            "stabilized": "https://github.com/vllm-project/vllm/pull/6909, https://github.com/vllm-project/vllm/issues/55545",
        },
    ),
    "transformers": Accepts(
        methods=PEFT_METHODS - NOT_INJECTED,
        magnitude=(f"{MAGNITUDE}.weight",),
        sources={"": _MEASURED, "methods": "peft.mapping.inject_adapter_in_model, which model.load_adapter calls"},
    ),
    "diffusers": Accepts(
        methods=frozenset({"LORA"}),
        copies=False,
        rows=False,
        biases=False,
        computed_start=False,
        scales=False,
        patterns=False,
        embeddings=False,
        parameters=False,
        sources={
            "": "diffusers.loaders.lora_pipeline (load_lora_weights), diffusers.utils.peft_utils (get_peft_kwargs)",
            "scales": _MEASURED,
        },
    ),
    "peft": Accepts(
        methods=PEFT_METHODS,
        prefix=True,
        adapter_in_key=True,
        sources={"": _MEASURED, "methods": "peft.PeftType of 0.21.2"},
    ),
}
