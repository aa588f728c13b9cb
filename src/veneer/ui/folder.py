"""What the page may read and write: one folder of runs, and the models of another."""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..io import atomic_write, locate
from ..methods.base import PeftConfig
from ..recipes.errors import InputError

HIDDEN = ".veneer-ui"  # uploads, logs and zips, below the folder
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MEMBERS, UNPACKED = 64, 2 << 30  # of an uploaded zip: how many files, and how many bytes in all
KINDS = (".safetensors", ".json", ".md", ".txt", ".yaml", ".jsonl", ".png")  # what an adapter's zip may hold
WHOLE_RUN = ("README.md", "report.md", "report.json", "loss.png", "recipe.yaml", "metrics.jsonl", "samples.png")
LORA = "pytorch_lora_weights.safetensors"  # diffusers' name


def check_name(name: str) -> str:
    """A name of a run, which becomes a folder of this name.

    Raises:
        InputError: it is no plain name.
    """
    name = name.strip()
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: use 1 to 64 letters, digits, '-', '_' and '.', the first a letter or a digit")
    return name


class Folder:
    """The runs of a page.

    Attributes:
        root: where runs are; nothing outside of it is written.
        models: folder whose subfolders are offered as models, or None.
    """

    def __init__(self, root: Path, models: Path | None = None) -> None:
        if root.exists() and not root.is_dir():
            raise InputError(f"--folder {str(root)!r} is a file; give a folder")
        if models is not None and not models.is_dir():
            raise InputError(f"--models {str(models)!r}: there is no such folder")
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.models = root.resolve(), None if models is None else models.resolve()

    @property
    def hidden(self) -> Path:
        """Where uploads and logs go."""
        made = self.root / HIDDEN
        made.mkdir(exist_ok=True)
        return made

    def inside(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            InputError: no plain name, or a link that leads out.
        """
        path = self.root / check_name(name)
        if path.is_symlink() or path.resolve().parent != self.root:
            raise InputError(f"{name!r} leads out of {self.root}")
        return path

    def adapters(self) -> list[str]:
        """Names of the runs that hold an adapter, the newest first."""
        found = [p for p in self.root.iterdir() if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        found = [p for p in found if (p / locate.CONFIG_NAME).is_file() or (p / LORA).is_file()]
        return [p.name for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]

    def plain_models(self) -> list[str]:
        """Models below `models`, as paths from there."""
        if self.models is None:
            return []
        found = [p for p in self.models.iterdir() if p.is_dir() and not p.is_symlink()]
        return sorted(p.name for p in found if (p / "config.json").is_file() or (p / "model_index.json").is_file())

    def model(self, name: str) -> str:
        """What a command gets for the name of a model in the page: embedded names and hub ids as they are.

        Raises:
            InputError: it is a path.
        """
        name = (name or "").strip()
        if not name:
            raise InputError("choose a model")
        if name in self.plain_models():
            return str(self.models / name)  # type: ignore[operator]
        path = PurePosixPath(name)
        if name.startswith(("-", ".", "/", "~")) or ".." in path.parts or "\\" in name or len(path.parts) > 2:
            there = f"; models below {self.models} go by their names" if self.models else "; start with --models FOLDER"
            raise InputError(f"model {name!r}: give an embedded name or a hub id (owner/name){there}")
        if Path(name).exists():  # a hub id that would be read as a folder of the place where the page was started
            raise InputError(
                f"model {name!r} is a folder here, which the page does not read; start with --models FOLDER"
            )
        return name

    def dataset(self, name: str, upload: str | None) -> str:
        """What a command gets as its data: an upload, or an embedded name or hub id.

        Raises:
            InputError: neither, or a path.
        """
        if upload:
            return upload
        name = (name or "").strip()
        if not name:
            raise InputError("choose data, or upload a JSONL, CSV or Parquet file")
        path = PurePosixPath(name)
        if name.startswith(("-", ".", "/", "~")) or ".." in path.parts or "\\" in name or Path(name).exists():
            raise InputError(f"data {name!r}: give an embedded name or a datasets id, or upload the file")
        return name

    def keep(self, upload: str, run: str) -> Path:
        """Copy an uploaded file to where it stays for a run."""
        source = Path(upload)
        target = self.hidden / "uploads" / check_name(run) / re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[-80:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return target

    def keep_pictures(self, uploads: Iterable[str], run: str) -> Path:
        """Copy uploaded images into a new folder of their own."""
        folder = self.hidden / "uploads" / check_name(run) / "pictures"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for i, upload in enumerate(uploads):
            shutil.copyfile(upload, folder / f"{i:03d}{Path(upload).suffix.lower()}")
        return folder

    def zipped(self, name: str) -> Path:
        """An adapter's files and its report as a zip.

        Raises:
            InputError: there is no such adapter.
        """
        source = self.inside(name)
        files = [*source.glob("*.safetensors"), *source.glob("adapter*.json")]
        files += [source / n for n in WHOLE_RUN if (source / n).is_file()]
        if name not in self.adapters():
            raise InputError(f"{name!r} holds no adapter; there are {', '.join(self.adapters()) or 'none'}")
        target = self.hidden / "zips" / f"{name}.zip"
        target.parent.mkdir(exist_ok=True)

        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for f in sorted(set(files)):
                    if f.is_file() and not f.is_symlink():
                        file.write(f, f"{name}/{f.name}")

        atomic_write.write_atomic(target, write)
        return target

    def unzip(self, upload: str, name: str) -> Path:
        """Put an uploaded adapter beside the others.

        Raises:
            InputError: no zip, no adapter, or members that no adapter has: paths that lead out, links, other kinds of
                files, too many or too large. Nothing is left of it.
        """
        target = self.inside(name)
        if target.exists():
            raise InputError(f"{name!r} exists; give another name")
        try:
            with zipfile.ZipFile(upload) as file, tempfile.TemporaryDirectory(dir=self.hidden) as made:
                for member, info in check_members(file).items():
                    with file.open(info) as source, open(Path(made) / member, "wb") as out:
                        copy_member(source, out, info.file_size, member)
                if not any((Path(made) / n).is_file() for n in (locate.CONFIG_NAME, LORA)):
                    raise InputError(f"the zip holds no {locate.CONFIG_NAME}; pack the folder an adapter was saved to")
                if (Path(made) / locate.CONFIG_NAME).is_file():
                    PeftConfig.from_pretrained(made)
                    locate.load_weights(made)
                shutil.copytree(made, target)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise InputError(f"{Path(upload).name} is no zip that can be read: {error}") from error
        except ValueError as error:
            raise InputError(f"{Path(upload).name}: {error}") from error
        return target


def check_members(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name -> member of the files of an adapter's zip, which may lie in one folder.

    Raises:
        InputError: a member that no adapter has.
    """
    members = [m for m in file.infolist() if not m.is_dir()]
    if len(members) > MEMBERS:
        raise InputError(f"the zip has {len(members)} files; {MEMBERS} are allowed")
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for member in members:
        path = PurePosixPath(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or kind not in (0, stat.S_IFREG):
            raise InputError(f"the zip has {member.filename!r}, a path that leads out or a link; pack plain files")
        if path.suffix.lower() not in KINDS or path.name.startswith("."):
            raise InputError(f"the zip has {member.filename!r}; an adapter's files end with {', '.join(KINDS)}")
        folders.add(path.parent)
        found[path.name] = member
    if len(folders) > 1:
        raise InputError("the zip has several folders; pack one adapter's folder")
    total = sum(m.file_size for m in members)
    if total > UNPACKED:
        raise InputError(f"the zip unpacks to {total:,} bytes; {UNPACKED:,} are allowed")
    return found


def copy_member(source: Any, out: Any, size: int, name: str) -> None:
    """Copy as many bytes as the zip's directory says; more is a lie."""
    left = size
    while block := source.read(min(1 << 20, left + 1)):
        left -= len(block)
        if left < 0:
            raise InputError(f"the zip's {name!r} is larger than the zip says")
        out.write(block)
