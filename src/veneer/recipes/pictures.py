"""Embedded images: scikit-learn's digits, and Fashion-MNIST as Debian packages it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

from ..files.embedded import check_sha256
from .errors import InputError, user_input

IMAGES = ("digits", "fashion-mnist", "fashion-mnist-test")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist; else FASHION_MNIST
SHA256 = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
}


def read_images(name: str) -> list[dict[str, Any]]:
    """Rows of (H, W) grey bytes and a class."""
    return read_digits() if name == "digits" else read_fashion("t10k" if name.endswith("test") else "train")


def read_digits() -> list[dict[str, Any]]:
    """1,797 handwritten digits of 8 by 8 pixels, of the UCI repository, in scikit-learn's wheel (BSD-3)."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError("the embedded digits need scikit-learn; install: pip install scikit-learn") from error
    found = load_digits()  # values from 0 to 16
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
    return [{"image": image, "label": str(label)} for image, label in zip(pixels, found.target, strict=True)]


def read_fashion(part: str) -> list[dict[str, Any]]:
    """Pieces of clothing of 28 by 28 pixels, in ten classes: 60,000 to train on and 10,000 to test.

    References:
        Xiao et al. 2017, arxiv.org/abs/1708.07747 (Fashion-MNIST)
    """
    import numpy as np

    folder = Path(os.environ.get("FASHION_MNIST") or FOLDER)
    read = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = folder / f"{part}-{kind}-ubyte.gz"
        if not path.is_file():
            raise InputError(
                f"{path} is not there; install Debian's package dataset-fashion-mnist (apt-get install), or set "
                "FASHION_MNIST to a folder with the four *-ubyte.gz files of github.com/zalandoresearch/fashion-mnist"
            )
        with user_input():
            check_sha256(path, SHA256[path.name], "get it again")
        read.append(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))
    pixels = read[0].reshape(-1, 28, 28)
    return [{"image": image, "label": FASHION[label]} for image, label in zip(pixels, read[1], strict=True)]
