"""Embedded ratings: fetched by pip from the user's index, checked, kept; here the index is a folder made by the test."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from veneer.recipes import ratings
from veneer.recipes.data import load_data, read_rows
from veneer.recipes.errors import InputError
from veneer.recipes.run import Run

MOVIES = '1\t2.25\tA \x93fine\x94 film, "truly\r\n2\t-1.5\tDull &amp; long\r\n3\t0.4\tA film\r\n4\t-0.5\tcaf\xe9\r\n5\t-3\tDull & long\r\n'
# A package that builds with what it brings along: pip asks for its name and version, as for any source archive.
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """import pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    made = pathlib.Path(folder, "vaderSentiment-3.3.2.dist-info")
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n")
    return made.name
def build_wheel(*a, **k):
    raise RuntimeError("nothing needs to be built")
"""


def packed(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


def sdist(movies: str = MOVIES) -> bytes:
    inner = packed({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": movies.encode("latin-1")})
    files = {"pyproject.toml": PYPROJECT.encode(), "backend.py": BACKEND.encode(), ratings.INNER: inner}
    files["PKG-INFO"] = b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n"
    return packed({f"vaderSentiment-3.3.2/{name}": data for name, data in files.items()})


@pytest.fixture
def index(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder that is the only index pip knows, with the archive in it, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    data = sdist()
    (folder / ratings.ARCHIVE).write_bytes(data)
    monkeypatch.setattr(ratings, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def kept(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_texts_with_a_clear_rating(index: Path, tmp_path: Path, monkeypatch: Any) -> None:
    expected = [
        {"text": 'A \x93fine\x94 film, "truly', "label": "positive"},
        {"text": "Dull & long", "label": "negative"},
        {"text": "café", "label": "negative"},
    ]
    assert read_rows("movie-sentiment") == expected
    assert kept(tmp_path) == [ratings.ARCHIVE]
    monkeypatch.setattr(subprocess, "run", None)  # the second time, nothing is fetched
    assert read_rows("movie-sentiment") == expected


def test_no_index_can_be_reached(index: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (index / ratings.ARCHIVE).unlink()
    with pytest.raises(InputError) as error:
        read_rows("movie-sentiment")
    said = str(error.value)
    assert "No matching distribution" in said and "PIP_INDEX_URL" in said
    target = tmp_path / "cache/data" / ratings.ARCHIVE
    assert str(target) in said and kept(tmp_path) == []
    target.write_bytes(sdist())  # what the message says to do
    monkeypatch.setattr(ratings, "SHA256", hashlib.sha256(target.read_bytes()).hexdigest())
    assert len(read_rows("movie-sentiment")) == 3


def test_other_bytes_are_refused(index: Path, tmp_path: Path) -> None:
    """Neither from the index, where pip must not even look into them, nor in the cache."""
    touched = BACKEND.replace("import pathlib", f"open({str(tmp_path / 'ran')!r}, 'w')\nimport pathlib")
    (index / ratings.ARCHIVE).write_bytes(
        packed(
            {
                "vaderSentiment-3.3.2/pyproject.toml": PYPROJECT.encode(),
                "vaderSentiment-3.3.2/backend.py": touched.encode(),
            }
        )
    )
    with pytest.raises(InputError, match="pip cannot fetch it"):
        read_rows("movie-sentiment")
    assert kept(tmp_path) == [] and not (tmp_path / "ran").exists()
    (tmp_path / "cache/data" / ratings.ARCHIVE).write_bytes(b"other")
    with pytest.raises(InputError, match=r"sha256 .* is not the expected .*; delete it to fetch it again"):
        read_rows("movie-sentiment")


def test_an_archive_without_the_file(index: Path) -> None:
    with pytest.raises(InputError, match="does not hold .*tweets_GroundTruth"):
        read_rows("tweet-sentiment")


def test_names_are_suggested() -> None:
    with pytest.raises(InputError, match="did you mean 'movie-sentiment'"):
        read_rows("movie-sentimant")


@pytest.mark.slow
def test_the_real_ones(tmp_path: Path, monkeypatch: Any) -> None:
    """Fetches from the package index that pip is configured for."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    sizes = {"movie-sentiment": 10_070, "product-sentiment": 2_977, "tweet-sentiment": 3_432, "news-sentiment": 2_931}
    assert {name: len(read_rows(name)) for name in ratings.RATINGS} == sizes
    run = {"model": "minilm-l6-v2", "data": "movie-sentiment", "task": "classification", "limit": 2000, "held_out": 500}
    found = load_data(Run(**run))
    assert len(found.train) == 2000 and len(found.held_out) == 500 and found.labels == ["negative", "positive"]
    assert not {r["text"] for r in found.train} & {r["text"] for r in found.held_out}
    assert load_data(Run(**run, seed=3)).held_out == found.held_out
    counts = Counter(r["label"] for r in found.held_out)
    assert abs(counts["positive"] - 250) < 25
