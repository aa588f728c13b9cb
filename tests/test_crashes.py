"""Saving and training that are cut off: by a signal, by a full disk, by a second writer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import veneer
from small import llama, lora
from soak import crashes
from test_cli import made  # noqa: F401
from test_cli import veneer as command
from veneer.cli.app import app
from veneer.io import atomic_write, locate, safe_read
from veneer.recipes import checkpoints


@pytest.mark.parametrize(
    ("name", "run", "full", "small", "bar"), crashes.SCENARIOS, ids=[s[0] for s in crashes.SCENARIOS]
)
def test_at_a_small_size(name: str, run: Any, full: int, small: int, bar: str) -> None:
    threads = torch.get_num_threads()
    try:
        figures = run(small)
    finally:
        torch.set_num_threads(threads)
    assert figures["ok"], figures


FAULTS: list[tuple[Any, str]] = [(os, "fsync"), (os, "replace"), (Path, "write_bytes")]
KINDS = [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: errno.errorcode[k])
def test_every_failing_call_of_a_save_leaves_the_old_adapter(kind: int, tmp_path: Path, monkeypatch: Any) -> None:
    """The n-th call to the disk fails, for every n until a save succeeds."""
    old, new = crashes.states()
    old.save_pretrained(tmp_path / "whole")
    wanted, fresh = crashes.held(tmp_path / "whole"), crashes.held_of(new, tmp_path)
    failed = 0
    for n in range(40):
        folder = tmp_path / str(n)
        old.save_pretrained(folder)
        calls = [0]
        with monkeypatch.context() as patch:
            for owner, name in FAULTS:
                real = getattr(owner, name)

                def fails(*given: Any, real: Any = real, **more: Any) -> Any:
                    calls[0] += 1
                    if calls[0] == n + 1:
                        raise OSError(kind, os.strerror(kind))
                    return real(*given, **more)

                patch.setattr(owner, name, fails)
            try:
                new.save_pretrained(folder)
            except OSError as error:
                failed += 1
                assert error.errno == kind  # noqa: PT017  (a later call may not fail)
                if "was not written" not in str(error):  # the last rename, which puts the config in its place
                    assert atomic_write.pending_path(folder / locate.CONFIG_NAME).is_file()
        now = crashes.held(folder)
        assert crashes.same(now, wanted) or crashes.same(now, fresh), n
        assert not list(folder.glob(".*.tmp"))
        new.save_pretrained(folder)
        assert crashes.same(crashes.held(folder), fresh)
        if calls[0] <= n:  # nothing was left to fail
            break
    assert failed >= 5 and calls[0] <= n


def test_a_read_only_folder_is_one_line(made: Path, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    where = ["--model", made / "causal", "--data", made / "pairs.jsonl", "--out", tmp_path / "run", "--steps", 2]
    result = CliRunner().invoke(app, ["train", *map(str, where)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    said = " ".join(result.output.split())
    assert "Read-only file system" in said and "as it was" in said and "Errno" not in said


def test_the_config_of_a_save_that_was_killed_between_the_files(tmp_path: Path) -> None:
    old, new = crashes.states()
    old.save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / locate.CONFIG_NAME).read_bytes()
    new.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / locate.CONFIG_NAME
    os.replace(path, atomic_write.pending_path(path))
    whole = crashes.held(tmp_path / "a")  # where there was none before
    path.write_bytes(before)
    assert crashes.same(crashes.held(tmp_path / "a"), whole) and whole[0].r == 8
    old.save_pretrained(tmp_path / "a")
    assert not atomic_write.pending_path(path).exists() and crashes.held(tmp_path / "a")[0].r == 4
    atomic_write.pending_path(path).write_text(json.dumps({"peft_type": "LORA"}))  # of another save: it is let be
    assert crashes.held(tmp_path / "a")[0].r == 4


def test_threads_that_save_into_one_folder_take_turns(tmp_path: Path) -> None:
    models = crashes.states()
    errors: list[BaseException] = []

    def save(model: Any) -> None:
        try:
            for _ in range(10):
                model.save_pretrained(tmp_path / "a")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=[m]) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    now = crashes.held(tmp_path / "a")
    assert any(crashes.same(now, crashes.held_of(m, tmp_path)) for m in models)


def test_a_writer_that_holds_a_folder_is_waited_for_and_named(tmp_path: Path) -> None:
    with (
        atomic_write.hold_lock(tmp_path),
        pytest.raises(TimeoutError, match="another process or thread has been writing"),
    ):
        with atomic_write.hold_lock(tmp_path, wait=0.05):
            pass
    with atomic_write.hold_lock(tmp_path, wait=0.05):
        pass


def test_a_thread_waits_for_another_one(tmp_path: Path) -> None:
    order: list[str] = []

    def write() -> None:
        with atomic_write.hold_lock(tmp_path):
            order.append("second")

    with atomic_write.hold_lock(tmp_path):
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


HOLD = "import sys, time; from pathlib import Path; from veneer.io import atomic_write\nwith atomic_write.hold_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_killed_writer_lets_go(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError), atomic_write.hold_lock(tmp_path / "." / ".." / tmp_path.name, wait=0.05):
        pass
    other.kill()
    other.wait()
    with atomic_write.hold_lock(tmp_path, wait=1):
        assert list(tmp_path.iterdir()) == []  # no file of the lock's


def test_locks_that_cannot_be_written_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))  # as root, no folder is read-only
    with pytest.raises(OSError, match=r"cannot be locked with .*set TMPDIR"), atomic_write.hold_lock(tmp_path):
        pass


def test_two_runs_in_one_folder(made: Path, tmp_path: Path) -> None:  # noqa: F811
    where = ["--model", made / "causal", "--data", made / "pairs.jsonl", "--out", tmp_path / "run", "--steps", 2]
    (tmp_path / "run").mkdir()
    with checkpoints.lock_folder(tmp_path / "run"):
        said = command("train", *where, ok=False).output
    assert "another process is training there now" in " ".join(said.split())
    command("train", *where)
    assert not (tmp_path / "run" / checkpoints.LOCK).exists()


def test_checkpoints_that_are_not_whole_do_not_count(tmp_path: Path) -> None:
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        if whole:
            (folder / checkpoints.MARK).write_text("{}")
    assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"
    checkpoints.drop_broken(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    old = tmp_path / ".a.json.999999999-140.tmp"
    own = tmp_path / f".a.json.{os.getpid()}.tmp"
    for path in (old, own):
        path.write_text("x")
        os.utime(path, (0, 0))
    fresh = tmp_path / ".a.json.999999998.tmp"
    fresh.write_text("x")
    atomic_write.sweep_temporaries(tmp_path / "a.json")
    assert not old.exists() and own.exists() and fresh.exists()


def test_half_a_line_of_metrics_is_passed_over(tmp_path: Path) -> None:
    from veneer.recipes.report import plot_losses

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert [m["step"] for m in safe_read.json_lines(path)] == [1, 2]
    plot_losses(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_figures_of_a_run_that_diverged_are_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"loss_after": float("nan"), "loss_before": float("inf")}))
    assert safe_read.json_object(path, nan=True)["loss_before"] == float("inf")
    with pytest.raises(ValueError, match="is no number of JSON's"):
        safe_read.json_object(path)


def test_a_model_and_its_file_agree(tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
