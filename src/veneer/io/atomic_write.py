"""Writing files so that nothing is lost: whole or not at all, one writer at a time, and an adapter's two files together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT = 60.0  # seconds for another writer of the same folder
STALE = 60.0  # seconds after which the temporary file of a process that is gone is removed


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a killed process leaves the old one or the new one: temporary file, fsync, rename.

    Raises:
        OSError: it cannot be written, as on a full disk or in a read-only folder; what was there is as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    sweep_temporaries(path)
    try:
        write(temporary)
        sync_path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(
            error.errno, f"{error.strerror or error}: {path} was not written, and what was there before is as it was"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def save_bytes(path: Path, data: bytes) -> None:
    """Write a file of these bytes; see `write_atomic`."""
    write_atomic(path, lambda p: p.write_bytes(data))


def save_text(path: Path, text: str) -> None:
    """Write a file of this text, in UTF-8; see `write_atomic`."""
    save_bytes(path, text.encode())


def sync_path(path: Path) -> None:
    """See that a file, or the names in a folder, are on the disk; not every system can for folders."""
    folder = path.is_dir()
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep_temporaries(path: Path) -> None:
    """Remove what killed processes left beside a file."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(left.suffixes[-2].removeprefix(".").partition("-")[0])
            if owner != os.getpid() and not is_alive(owner) and time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def is_alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs as somebody else
    return True


@contextmanager
def hold_lock(path: Path, wait: float = WAIT) -> Iterator[None]:
    """Hold a folder for one writer, of this process or another of the same user on this machine; a killed one lets go.

    The path itself is not touched and need not exist: the lock is a file in the user's temporary folder, named by a hash of
    the path, so that adapter folders hold the adapter's files only.

    Raises:
        TimeoutError: another writer holds it for longer than `wait` seconds.
        OSError: the temporary folder cannot be written.
    """
    import filelock

    key = hashlib.sha256(os.path.normcase(path.resolve()).encode()).hexdigest()[:32]
    file = _locks_folder() / f"{key}.lock"
    try:
        # A lock object of its own for each holder: threads of this process exclude one another as processes do.
        file.parent.mkdir(mode=0o700, exist_ok=True)
        held = filelock.FileLock(file).acquire(timeout=wait, poll_interval=0.02)
    except filelock.Timeout:
        raise TimeoutError(
            f"{path}: another process or thread has been writing into it for {wait:g} s; give each its own folder"
        ) from None
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{error.strerror or error}: {path} cannot be locked with {file}; set TMPDIR to a folder for files",
        ) from error
    with held:
        yield


def _locks_folder() -> Path:
    """The folder of this user's locks. Windows' temporary folder is the user's own."""
    owner = "" if sys.platform == "win32" else f"-{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"veneer-locks{owner}"


def write_pair(first: tuple[Path, bytes], second: tuple[Path, bytes]) -> None:
    """Write two files of one folder that belong together.

    The second is written beside its place before the first is replaced, and put there after: a process that is killed
    between leaves the new first file and, under `pending_path`, the new second one, which readers take where it is the one
    that the first belongs with.
    """
    path, data = second
    with hold_lock(path.parent):
        save_bytes(pending_path(path), data)
        save_bytes(*first)
        os.replace(pending_path(path), path)
        sync_path(path.parent)


def pending_path(path: Path) -> Path:
    """Where the second file of a pair waits for the first."""
    return path.with_name(f".{path.name}.next")
