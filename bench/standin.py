"""Trainer's step and the memory of its process, one script of peft's own words, under the stand-in and under peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import bench
from .harness import ROOT, Figure, Red, ratio

SCRIPT = Path(__file__).with_name("standin_script.py")
COMMANDS = {"stand-in": [sys.executable, "-m", "veneer.peft", str(SCRIPT)], "peft": [sys.executable, str(SCRIPT)]}
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"config": {"r": 8}, "checkpointing": False},
    "LoRA, dropout 0.1": {"config": {"r": 8, "lora_dropout": 0.1}, "checkpointing": False},
    "DoRA": {"config": {"r": 8, "use_dora": True}, "checkpointing": False},
    "LoRA, gradient checkpointing": {"config": {"r": 8}, "checkpointing": True},
}


def in_turns(given: Mapping[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Blocks of steps of both processes, one after the other: seconds of each, losses, and peaks in bytes."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        argument = json.dumps({**given, "folder": folder, "rounds": rounds})
        processes = {
            name: subprocess.Popen(
                [*command, argument],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for name, command in COMMANDS.items()
        }

        def answer(name: str) -> list[str]:
            out = processes[name].stdout
            assert out is not None
            for line in out:
                if line.startswith(("took ", "end ")):
                    return line.split(maxsplit=1)
            errors.seek(0)
            raise Red(f"the script under {name} ended early", errors.read().splitlines()[-8:])

        found: dict[str, dict[str, Any]] = {name: {"took": []} for name in processes}
        try:
            for _ in range(rounds):
                for name, process in processes.items():
                    assert process.stdin is not None
                    process.stdin.write("on\n")
                    process.stdin.flush()
                    kind, said = answer(name)
                    if kind == "end":
                        end = json.loads(said)
                        found[name]["took"].append(end.pop("took"))
                        found[name] |= end
                    else:
                        found[name]["took"].append(float(said.split()[0]))
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    return found


@bench
def standin_trainer(quick: bool) -> list[Figure]:
    """Seconds of a Trainer step and peak memory of the process under the stand-in, against real peft."""
    found = []
    shape = {"hidden": 512, "layers": 8, "rows": 4, "tokens": 128, "threads": 2, "block": 4}
    note = "h=512, 8 layers, r=8, 4 x 128 tokens, Trainer with AdamW, blocks of 4 steps"
    for case, given in CASES.items():
        rounds = 4 if quick else 10
        runs = in_turns(shape | given, rounds)
        ours, theirs = runs["stand-in"], runs["peft"]
        if not given["config"].get("lora_dropout"):  # masks are drawn in another way, so losses differ by chance
            apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            if not apart <= 1e-4:
                raise Red(
                    f"{case}: losses of Trainer differ by {apart:.1e}", [str(ours["losses"]), str(theirs["losses"])]
                )
        found.append(
            ratio(
                f"Trainer step under the stand-in / peft: {case}",
                ours["took"][1:],
                theirs["took"][1:],
                bar=1.0,
                note=note,
                row=f"Trainer step under the stand-in ÷ peft: {case}",
            )
        )
        for what, a, b in (
            ("peak of the process", ours["peak"], theirs["peak"]),
            ("growth while it trains", ours["peak"] - ours["before"], theirs["peak"] - theirs["before"]),
        ):
            value = a / b
            name = f"Trainer under the stand-in / peft: {case}: {what}"
            bar = 1.0 if what.startswith("peak") else None
            found.append(
                Figure(name, value, value, value, "ratio", bar=bar, note=f"{a / 2**20:.0f} MiB against {b / 2**20:.0f}")
            )
    return found
