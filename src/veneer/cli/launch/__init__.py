"""Starting a run on several processes of this machine, through accelerate's launcher and the configs beside this file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..errors import InputError

CONFIGS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def command(processes: int, layout: str, arguments: list[str], port: int = 0) -> list[str]:
    """What starts `veneer ARGUMENTS` on several processes.

    Args:
        processes: how many.
        layout: a name in `CONFIGS`.
        arguments: of `veneer`.
        port: where the processes meet; 0 for a free one.
    """
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[layout])]
    return [*start, "--num_processes", str(processes), "--main_process_port", str(port), "-m", "veneer", *arguments]


def launch(processes: int, layout: str, arguments: list[str]) -> None:
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
    done = subprocess.run(command(processes, layout, arguments), env=environment, check=False)
    if done.returncode:
        raise InputError(
            f"one of the {processes} processes ended before the run did, and the others were stopped (exit status "
            f"{done.returncode}; its own message is above); continue from the last checkpoint with --resume, on any "
            "number of processes that divides batch_size"
        )
