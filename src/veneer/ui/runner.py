"""The one command that runs at a time, as a process of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..io import safe_read
from ..recipes.errors import InputError
from .folder import Folder

STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Job:
    """A run of `veneer train` or `veneer dreambooth`.

    Attributes:
        kind: "train" or "dreambooth".
        name: of the run and its folder.
        arguments: of the command, after `veneer`.
        folder: where the run writes.
        log: file with all that it printed.
        steps: how many it will take, or 0 where that is not known.
        state: "running", "finished", "stopped" or "failed".
    """

    kind: str
    name: str
    arguments: Sequence[str]
    folder: Path
    log: Path
    steps: int = 0
    state: str = "running"
    started: float = field(default_factory=time.time)
    process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> str:
        """What does the same in a terminal."""
        return "veneer " + shlex.join(self.arguments)

    def printed(self) -> str:
        """What the command said, without its colours."""
        if not self.log.is_file():
            return ""
        text = STYLE.sub("", self.log.read_text("utf-8", "replace"))
        return "\n".join(line.rsplit("\r", 1)[-1] for line in text.splitlines())

    def complaint(self) -> str:
        """Why it failed, in one line."""
        lines = [line.strip() for line in self.printed().splitlines() if line.strip()]
        said = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
        return said[-1] if said else lines[-1] if lines else "the command ended without a word"

    def step(self) -> int:
        """The last step that was logged."""
        return max((int(m.get("step", 0)) for m in safe_read.json_lines(self.folder / "metrics.jsonl")), default=0)


class Runner:
    """Starts, watches and stops the one job of a page."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.job: Job | None = None
        self.lock = threading.Lock()

    @property
    def busy(self) -> bool:
        return self.job is not None and self.job.state == "running"

    def start(self, kind: str, name: str, arguments: Sequence[str], steps: int) -> Job:
        """Run `veneer` with some arguments.

        Raises:
            InputError: another job runs.
        """
        with self.lock:
            if self.job is not None and self.job.state == "running":
                raise InputError(f"{self.job.name!r} is being trained; stop it or wait until it has ended")
            logs = self.folder.hidden / "logs"
            logs.mkdir(exist_ok=True)
            job = Job(kind, name, list(arguments), self.folder.inside(name), logs / f"{name}.log", steps)
            output = open(job.log, "wb")  # noqa: SIM115  (the watcher closes it)
            job.process = subprocess.Popen(
                [sys.executable, "-m", "veneer", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"COLUMNS": "120", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
                start_new_session=True,
            )
            self.job = job
            threading.Thread(target=self.watch, args=(job, output), daemon=True).start()
            return job

    def watch(self, job: Job, output: IO[bytes]) -> None:
        assert job.process is not None
        code = job.process.wait()
        output.close()
        if job.state == "running":
            job.state = "finished" if code == 0 else "failed"

    def stop(self) -> None:
        """End the job, with all its processes."""
        job = self.job
        if job is None or job.state != "running" or job.process is None:
            raise InputError("nothing is being trained")
        job.state = "stopped"
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(job.process.pid, sent)
                job.process.wait(5)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def once(self, arguments: Sequence[str], seconds: float = 300) -> str:
        """What a short command prints.

        Raises:
            InputError: it fails; the message is its own.
        """
        try:
            done = subprocess.run(
                [sys.executable, "-m", "veneer", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1"},
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(f"it took more than {seconds:.0f} s and was stopped") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise InputError(lines[-1].removeprefix("Error: ") if lines else "the command failed without a word")
        return STYLE.sub("", done.stdout)
