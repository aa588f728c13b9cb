"""Traces which functions of the package a tensor, an adapter and a file go through: python tools/walks.py [tensor|attach|load].

Prints one line for each call into another file, indented by depth, then which files are entered most.
tools/architecture.py writes its output into docs/architecture.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import veneer

ROOT = Path(veneer.__file__).parent
WALKS = ("tensor", "attach", "load")


class Net(nn.Module):
    """Two layers of which one is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # each Net is the same base model
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def trace_calls(run: Callable[[], object]) -> list[tuple[int, str, str]]:
    """Calls into another file of the package while `run` runs: (depth, file, function)."""
    steps: list[tuple[int, str, str]] = []
    files: list[str | None] = []  # of the frames that are open, None outside the package

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            path = Path(frame.f_code.co_filename)
            file = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
            caller = next((f for f in reversed(files) if f is not None), None)
            shown = not frame.f_code.co_name.startswith("<")
            if file is not None and file != caller and shown:
                steps.append((len({f for f in files if f}), file, frame.f_code.co_qualname))
            files.append(file)
        elif event == "return" and files:
            files.pop()

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return steps


def prepare_walk(name: str, folder: Path) -> Callable[[], object]:
    """What is to be traced, everything that it needs made before."""
    base = Net()
    config = veneer.LoraConfig(r=4, target_modules=["first"])
    if name == "attach":
        veneer.get_peft_model(Net(), config)  # so that no import is traced
        return lambda: veneer.get_peft_model(base, config)
    model = veneer.get_peft_model(base, config)
    if name == "load":
        model.save_pretrained(str(folder))
        veneer.PeftModel.from_pretrained(Net(), str(folder))
        fresh = Net()
        return lambda: veneer.PeftModel.from_pretrained(fresh, str(folder))
    x = torch.randn(64, 16)
    model(x)
    return lambda: base.first(x).sum().backward()


def describe_walk(name: str) -> str:
    """The walk as text: each function where it is entered first, then how often files are entered and floors climbed."""
    with tempfile.TemporaryDirectory() as folder:
        steps = trace_calls(prepare_walk(name, Path(folder)))
    seen: set[tuple[str, str]] = set()
    lines = []
    for depth, file, function in steps:
        if (file, function) not in seen:
            seen.add((file, function))
            lines.append(f"{'  ' * depth}{file}: {function}")
    entered = Counter(file for _, file, _ in steps)
    most = ", ".join(f"{file} {n}" for file, n in entered.most_common(3))
    return "\n".join([*lines, "", f"entered most: {most}"])


if __name__ == "__main__":
    for walk in sys.argv[1:] or WALKS:
        print(f"# {walk}\n\n{describe_walk(walk)}\n")
