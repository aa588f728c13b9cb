"""Starting a run on several processes of this machine, through accelerate's launcher and the configs beside this file."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from pathlib import Path

from ...targets.suggest import suggest
from ..errors import InputError
from ..run import Run

CONFIGS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"), key=lambda path: path.stem)}


def launch_command(processes: int, layout: str, arguments: list[str], port: int = 0) -> list[str]:
    """What starts `veneer ARGUMENTS` on several processes.

    Args:
        processes: how many.
        layout: a name in `CONFIGS`.
        arguments: of `veneer`.
        port: where the processes meet; 0 for a free one.
    """
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[layout])]
    return [*start, "--num_processes", str(processes), "--main_process_port", str(port), "-m", "veneer", *arguments]


def check_launch(run: Run, processes: int | None, layout: str | None) -> None:
    """Raise InputError for a number of processes or a layout that a run cannot have."""
    if layout is not None and layout not in CONFIGS:
        raise InputError(f"--launch {layout!r}: must be one of {', '.join(CONFIGS)}{suggest(layout, CONFIGS)}")
    if processes is None:
        raise InputError(f"--launch {layout}: say on how many processes, with --processes N")
    if layout in (None, "ddp") and processes < 2:
        raise InputError("--processes 1: leave it out to run in this process; --launch zero3-offload runs on 1 too")
    check_rows(run, processes)


def check_rows(run: Run, processes: int) -> None:
    """Raise InputError where the processes cannot have equal parts of a batch."""
    if run.batch_size % processes:
        allowed = [n for n in range(1, run.batch_size + 1) if run.batch_size % n == 0]
        raise InputError(
            f"{processes} processes cannot share batch_size={run.batch_size} rows a step evenly; use "
            f"{', '.join(map(str, allowed))} processes, or another --batch-size"
        )


def drop_options(arguments: list[str], *names: str) -> list[str]:
    """A command's arguments without some options that take a value."""
    kept: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument in names:
            next(left, None)
        elif not argument.startswith(tuple(f"{n}=" for n in names)):
            kept.append(argument)
    return kept


def launch_processes(processes: int, layout: str, arguments: list[str]) -> None:
    """Run `veneer ARGUMENTS` on several processes and wait for them.

    Raises:
        InputError: a layout whose library is missing, or that cannot run here; or a process that failed.
    """
    import importlib.util

    import torch

    if layout.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise InputError(f"--launch {layout} needs deepspeed; install it with: pip install 'veneer[processes]'")
    cpu = not torch.accelerator.is_available()
    if layout == "fsdp2" and cpu:
        raise InputError(
            "--launch fsdp2: accelerate runs FSDP on accelerators only, and this machine has none; use ddp or zero3"
        )
    count = 0 if cpu else torch.accelerator.device_count()
    if not cpu and processes > count:
        raise InputError(f"--processes {processes}: this machine has {count} devices; use {count} or fewer")
    environment = dict(os.environ)
    if cpu:  # each process would else take all cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        environment.setdefault("DS_ACCELERATOR", "cpu")
    done = subprocess.run(launch_command(processes, layout, arguments), env=environment, check=False)
    if done.returncode:
        raise InputError(
            f"one of the {processes} processes ended before the run did, and the others were stopped (exit status "
            f"{done.returncode}; its own message is above); continue from the last checkpoint with --resume, on any "
            "number of processes that divides batch_size"
        )


def leave_process() -> None:
    """End a process that is one of several, its work done.

    While Python takes itself down, a thread of gloo's that still wants the interpreter is ended by it, and with that
    thread now and then the process ("terminate called without an active exception"): the launcher would call a run
    that is whole a failure.
    """
    atexit._run_exitfuncs()  # what libraries asked for at an exit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
