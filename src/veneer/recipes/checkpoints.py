"""Checkpoints that are whole or do not count, and one run a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..io import atomic_write
from .errors import InputError, report_disk_errors

MARK = "complete.json"  # in a checkpoint, when all else in it is on the disk
LOCK = ".running"  # name of a run's lock; a run also locks its folder, whenever it writes an adapter into it


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's whole checkpoints, the oldest first."""
    found = [p.parent for p in folder.glob(f"checkpoints/checkpoint-*/{MARK}")]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next(reversed(list_checkpoints(folder)), None)


def drop_broken(folder: Path) -> None:
    """Remove checkpoints in whose writing a run was killed, which Trainer would count among those to keep."""
    whole = set(list_checkpoints(folder))
    for path in folder.glob("checkpoints/checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path)


class WholeCheckpoints:
    """For transformers' Trainer: marks a checkpoint once all processes have written their part of it."""

    def _save_checkpoint(self, model: object, trial: object) -> None:
        trainer: Any = self
        folder = Path(trainer._get_output_dir(trial)) / f"checkpoint-{trainer.state.global_step}"
        if trainer.args.process_index == 0:
            (folder / MARK).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        trainer.accelerator.wait_for_everyone()
        if trainer.args.process_index == 0:
            for path in [*folder.rglob("*"), folder]:
                atomic_write.sync_path(path)
            atomic_write.save_text(folder / MARK, f'{{"step": {trainer.state.global_step}}}\n')


@contextmanager
def hold_run(folder: Path) -> Iterator[ExitStack]:
    """What a run holds until it ends; within it, errors of the disk say whether `--resume` can go on."""
    with report_disk_errors(lambda: last_checkpoint(folder) is not None), ExitStack() as held:
        yield held


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Within the block, this is the only run in a folder.

    Raises:
        InputError: another process runs there.
    """
    try:
        with atomic_write.hold_lock(folder / LOCK, wait=0):
            yield
    except TimeoutError as error:
        raise InputError(
            f"{folder}: another process is training there now; wait for it, or give another --out"
        ) from error
