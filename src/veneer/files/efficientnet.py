"""EfficientNet-lite0 of the package efficientnet-lite-pytorch, as a transformers model for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

WEIGHTS = "models/efficientnet-lite0-57934424.pth"


class EfficientNetLiteConfig(PretrainedConfig):
    """The config of EfficientNet-lite0."""

    model_type = "efficientnet-lite"


class EfficientNetLite(PreTrainedModel):
    """The package's network, with transformers' way of loading and of saying its loss.

    References:
        Tan and Le 2019, arxiv.org/abs/1905.11946 (EfficientNet)
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(config)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net._fc = nn.Linear(self.net._fc.in_features, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: object) -> Any:
        """Logits (B, classes) of images (B, 3, H, W)."""
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def register() -> None:
    """Make transformers' Auto classes know it."""
    AutoConfig.register("efficientnet-lite", EfficientNetLiteConfig, exist_ok=True)
    AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)


def convert(source: Path, target: Path) -> None:
    """Write the package's weights as a folder that transformers loads, with an image processor."""
    from transformers import EfficientNetImageProcessorPil

    model = EfficientNetLite(EfficientNetLiteConfig(num_labels=1000))
    model.net.load_state_dict(torch.load(source / WEIGHTS, weights_only=True, map_location="cpu"))
    model.save_pretrained(target)
    size = {"height": 224, "width": 224}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    EfficientNetImageProcessorPil(
        size=size, do_center_crop=False, image_mean=mean, image_std=std, include_top=False, resample=3
    ).save_pretrained(target)
