"""Images to classes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models import find_model
from ..run import Run
from .base import OneClass, Row


class ImageClassification(OneClass):
    """Rows of an image, as a path or as an image, and its class."""

    name, auto = "image-classification", "AutoModelForImageClassification"
    heads = ("classifier", "fc", "_fc", "head")
    by_length = False

    def columns(self, run: Run) -> list[tuple[str, ...]]:
        return [(run.image_column, run.label_column)]

    def processor_of(self, model: str) -> Any:
        from transformers import AutoImageProcessor

        where = find_model(model)
        try:
            # Pillow's resizing, so that results do not depend on whether torchvision is installed.
            return AutoImageProcessor.from_pretrained(where, backend="pil")
        except (OSError, ValueError) as error:
            raise InputError(f"model {model!r} has no image processor that can be loaded: {error}") from error

    def processor(self, run: Run) -> Any:
        found = self.processor_of(run.model)
        if run.image_size is not None:
            found.size = {"height": run.image_size, "width": run.image_size}
            found.do_center_crop = False
        return found

    def files(self, run: Run) -> str | None:
        return run.image_column

    def check(self, run: Run, rows: list[Row], source: str) -> None:
        if find_spec("PIL") is None:
            raise InputError(f"{self.name} needs pillow; run: pip install 'veneer[media]'")
        for i, row in enumerate(rows, 1):
            to_rgb(row[run.image_column], f"data {source!r}, row {i}")

    def encode(self, run: Run, rows: list[Row], processor: object, labels: list[str]) -> list[Row]:
        """Images stay what they are until a batch is made of them: pixels of a large data set fill no memory."""
        numbers = {name: i for i, name in enumerate(labels)}
        return [{"image": r[run.image_column], "labels": numbers[str(r[run.label_column])]} for r in rows]

    def collator(self, run: Run, processor: Any, model: Any) -> Any:
        import torch

        def batch(rows: list[Row]) -> dict[str, Any]:
            images = [to_rgb(r["image"], "image") for r in rows]
            pixels = processor(images, return_tensors="pt")["pixel_values"]  # (B, 3, H, W)
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            return {"pixel_values": pixels.to(dtype), "labels": torch.tensor([r["labels"] for r in rows])}

        return batch

    def row(self, run: Run, text: str, context: str | None, labels: list[str]) -> Row:
        to_rgb(text, "image")
        return {run.image_column: text, run.label_column: labels[0]}

    def asked(self, run: Run, rows: list[Row], processor: object) -> list[str]:
        """Paths of images; of images without one, what they are labelled."""
        paths = [r[run.image_column] for r in rows]
        return [p if isinstance(p, str) else f"{r[run.label_column]}" for p, r in zip(paths, rows, strict=True)]


def to_rgb(image: Any, where: str) -> Any:
    """An image in RGB, from a path, an image, or (H, W) or (H, W, 3) bytes.

    Sixteen bits of grey are scaled to eight, as Pillow would clip them; what is transparent becomes white.

    Raises:
        InputError: no image, a file that ends early, or a mode without a meaning in RGB.
    """
    import numpy as np
    from PIL import Image

    try:
        if isinstance(image, str | Path):
            where = f"{where}: {str(image)!r}"
            image = Image.open(image)
            image.load()
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(image)
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where} cannot be read as an image: {error}") from error
    if not isinstance(image, Image.Image):
        raise InputError(f"{where}: {str(image)[:60]!r} is no path of an image")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)  # (H, W)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise InputError(f"{where} has values from {pixels.min()} to {pixels.max()}; 16 bits are 0 to 65535")
        return Image.fromarray((pixels / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "F":
        raise InputError(f"{where} has floating-point pixels (mode F), of no known range; save it with 8 or 16 bits")
    return image.convert("RGB")
