"""What is measured of adapters on fused experts."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, MixtralConfig

import veneer

from .figures import bench, median, scramble
from .harness import Figure, figure, interleaved, ratio
from .trio import same_step

COUNTS = {8: 1024, 64: 256}  # experts -> channels of each
WAYS = ("grouped_mm", "batched_mm", "eager")
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture(experts: int, width: int, quick: bool) -> Any:
    """One Mixtral layer, two experts a token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256 if quick else 512, "intermediate_size": width // 4 if quick else width}
    return AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2, vocab_size=512,
                      num_local_experts=experts, num_experts_per_tok=2)
    )  # fmt: skip


def prepared(experts: int, width: int, quick: bool) -> dict[str, Any]:
    """The frozen floor, and the same adapter in both libraries, over one set of weights."""
    models: dict[str, Any] = {"floor": mixture(experts, width, quick).requires_grad_(False)}
    weights = models["floor"].state_dict()
    with tempfile.TemporaryDirectory() as folder:
        config = veneer.LoraConfig(r=8, target_modules=[], target_parameters=PARAMETERS)
        models["veneer"] = veneer.get_peft_model(mixture(experts, width, quick), config)
        scramble(models["veneer"])
        models["veneer"].save_pretrained(folder)
        models["peft"] = peft.PeftModel.from_pretrained(mixture(experts, width, quick), folder, is_trainable=True)
    for library in ("veneer", "peft"):
        own = dict(base_of(models[library]).named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                if name in own:  # peft has put some elsewhere, and they are equal by their seed
                    own[name].data = value
    for model in models.values():  # one layer alone would need no gradient below its experts
        base_of(model).enable_input_require_grads()
    return {n: m.train() for n, m in models.items()}


def base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, (veneer.PeftModel, peft.PeftModel)) else model


def saved(model: Any, ids: Tensor) -> float:
    """Bytes of the storages kept for the backward, those of the parameters aside."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return float(sum(s.nbytes() for s in kept.values()))


@bench
def experts_step(quick: bool) -> list[Figure]:
    """Forward and backward of LoRA on every expert of a Mixtral layer, against the frozen floor and peft."""
    drawn = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0))
    found = []
    for experts, width in COUNTS.items():
        models = prepared(experts, width, quick)
        for way in WAYS:
            for model in models.values():
                base_of(model).set_experts_implementation(way)
            # The base copies a weight for each token in batched_mm, which is meant for few of them.
            ids, rounds = (drawn[:1, :32], 5) if way == "batched_mm" else (drawn, 9)
            same_step(models, ids, f"{experts} experts, {way}")

            def step(model: Any, ids: Tensor = ids) -> None:
                model(input_ids=ids, labels=ids).loss.backward()
                model.zero_grad(set_to_none=True)

            taken = interleaved({n: partial(step, m) for n, m in models.items()}, 3 if quick else rounds, warmup=1)
            theirs = median([a / b for a, b in zip(taken["peft"], taken["floor"], strict=True)])
            note = f"r=8, {ids.numel()} tokens, two experts each; floor {median(taken['floor']):.3f} s"
            name = f"{experts} experts, {way}: step"
            found.append(ratio(f"{name} / frozen floor", taken["veneer"], taken["floor"], reference=theirs, note=note))
            size = {n: saved(m, ids) for n, m in models.items()}
            found.append(
                figure(
                    f"{experts} experts, {way}: saved / frozen floor",
                    [size["veneer"] / size["floor"]],
                    "ratio",
                    reference=size["peft"] / size["floor"],
                    note=f"floor {size['floor'] / 2**20:.1f} MiB",
                )
            )
    return found
