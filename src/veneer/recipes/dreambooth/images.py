"""Image files of a folder as tensors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def list_images(folder: str | Path) -> list[Path]:
    """The folder's images, in the order of their names.

    Raises:
        InputError: no such folder, or no image in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder with images")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no images in it; files may end in {', '.join(SUFFIXES)}")
    return found


def read_image(path: Path) -> Any:
    """An image in RGB, upright; what is transparent becomes white.

    Raises:
        InputError: a file that is no image, or damaged.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); take it out of the folder") from error
    if image.mode.startswith(("I", "F")):  # 16 bits a pixel, or more
        low, high = image.getextrema()
        image = image.point(lambda v: (v - low) * (255 / max(1, high - low))).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def to_tensor(image: object, side: int, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """The largest square of an image, (3, side, side) in [-1, 1]; from its middle, or wherever `at` says in [0, 1]."""
    import numpy as np
    from PIL import Image, ImageOps

    square = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS, centering=at)
    values = torch.from_numpy(np.asarray(square).copy())  # (side, side, 3)
    return values.permute(2, 0, 1).float() / 127.5 - 1


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Images of the subject, each with one of its class where prior preservation is on.

    Where an image is cut depends on seed, epoch and image alone, so that a resumed run cuts as one that never stopped.
    """

    def __init__(self, subject: list[Path], others: list[Path], side: int, center: bool, seed: int) -> None:
        self.subject, self.others = [read_image(p) for p in subject], others
        self.side, self.center, self.seed, self.epoch = side, center, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(len(self.subject), len(self.others))

    def __getitem__(self, i: int) -> dict[str, Any]:
        drawn = random.Random(f"{self.seed} {self.epoch} {i}")
        at = (0.5, 0.5) if self.center else (drawn.random(), drawn.random())
        item = {"subject": to_tensor(self.subject[i % len(self.subject)], self.side, at)}
        if self.others:
            item["other"] = to_tensor(read_image(self.others[i % len(self.others)]), self.side)
        return item


def make_grid(images: list[Any], columns: int) -> Any:
    """Images side by side."""
    from PIL import Image

    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
