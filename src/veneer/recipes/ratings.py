"""Embedded data: short texts that people rated for sentiment.

The texts belong to others, so no copy of them is part of Veneer: pip fetches the archive from the user's package index
on first use, and it is kept in the cache folder.

References:
    Hutto and Gilbert 2014, VADER (ICWSM), section 4: twenty raters a text, from -4 (most negative) to 4
"""

from __future__ import annotations

import csv
import html
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ..files.embedded import cache_folder, check_sha256
from .errors import InputError, user_input

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
NEUTRAL = 0.5  # texts with a mean rating nearer to zero have no clear class: 5% of the movie snippets
RATINGS = {
    "movie-sentiment": "movieReviewSnippets_GroundTruth.txt",
    "product-sentiment": "amazonReviewSnippets_GroundTruth.txt",
    "tweet-sentiment": "tweets_GroundTruth.txt",
    "news-sentiment": "nytEditorialSnippets_GroundTruth.txt",
}


def read_ratings(name: str) -> list[dict[str, Any]]:
    """Texts with a class, "positive" or "negative", in the archive's order and without repeats.

    Raises:
        InputError: the archive is not in the cache and no package index gives it, or it is not the expected one.
    """
    rows: dict[str, str] = {}
    for _, mean, text in read_table(find_archive(), RATINGS[name]):
        if abs(float(mean)) >= NEUTRAL:
            rows.setdefault(html.unescape(text).strip(), "positive" if float(mean) > 0 else "negative")
    return [{"text": text, "label": label} for text, label in rows.items()]


def read_table(path: Path, name: str) -> list[list[str]]:
    """The rows (id, mean rating, text) of one file in the archive within the archive."""
    try:
        with tarfile.open(path) as outer:
            inside = outer.extractfile(f"{path.name.removesuffix('.tar.gz')}/{INNER}")
            assert inside is not None
            with tarfile.open(fileobj=inside) as inner:
                file = inner.extractfile(f"{Path(INNER).name.removesuffix('.tar.gz')}/{name}")
                assert file is not None
                text = file.read().decode("latin-1")
    except (KeyError, tarfile.TarError) as error:
        raise InputError(
            f"{path} does not hold {INNER} with {name} in it: {error}; delete it to fetch it again"
        ) from error
    return list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


def find_archive() -> Path:
    """The archive in the cache folder, fetched on first use; only the pinned bytes are ever used."""
    target = cache_folder() / "data" / ARCHIVE
    if not target.is_file():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
                fetch_archive(Path(folder), target)
                os.replace(Path(folder) / ARCHIVE, target)
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error}; set VENEER_CACHE to a folder that can") from error
    with user_input():
        check_sha256(target, SHA256, "delete it to fetch it again")
    return target


def fetch_archive(folder: Path, target: Path) -> None:
    """Let pip download the archive, from the index and with the credentials it is configured for."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", "utf-8")  # checked before pip looks into the archive
    package = PACKAGE.partition("==")[0]
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-binary", package]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / ARCHIVE).is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()] or said or ["it gave no reason"]
        raise InputError(
            f"the data come from the package index, in the source archive of {PACKAGE}, and pip cannot fetch it: "
            f"{errors[-1].strip()}\n"
            f"Let pip reach an index (PIP_INDEX_URL, or `pip config`), or put {ARCHIVE} (sha256 {SHA256[:12]}...) at "
            f"{target}"
        )
