"""Two real processes on gloo: every layout trains as one process does, and saves the same file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import veneer
from test_cli import made  # noqa: F401  (a fixture)
from test_console import OF_DDP, foreign_lines
from veneer.distributed import sharding
from veneer.recipes.errors import InputError
from veneer.recipes.launch import CONFIGS, check_launch, drop_options, launch_command
from veneer.recipes.recipe import build_run

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
               "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200",
               "PYTHONPATH": os.pathsep.join([str(Path(veneer.__file__).parents[1]), str(HERE)])}  # fmt: skip
METHODS = [
    "lora", "dora", "ia3", "oft", "vera", "prefix", "bottleneck", "pissa", "saved", "rows", "norms", "parameter"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def run(arguments: list[str], limit: int = 120) -> str:
    """Run to the end, or kill the whole group of processes."""
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, out[-4000:]
    return out


def step(layout: str, folder: Path) -> dict[str, Any]:
    """Losses of each method in one layout."""
    start = [sys.executable]
    if layout != "single":
        start += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    run([*start, str(HERE / "processes_step.py"), layout, str(folder)])
    found: dict[str, Any] = json.loads((folder / f"{layout}.json").read_text())
    assert list(found) == METHODS
    for name, losses in found.items():
        assert isinstance(losses, list), f"{layout}, {name}:\n{losses}"
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("layouts")
    return folder, step("single", folder)


SLOW = ["ddp", "fsdp", "zero2", "zero3", "zero3-offload"]


@pytest.mark.parametrize(
    "layout", ["fsdp-layers", "zero3-init", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_every_method_trains_as_in_one_process(layout: str, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, wanted = alone
    found = step(layout, folder)
    for name in METHODS:
        assert found[name] == pytest.approx(wanted[name], abs=1e-4), name
        one, two = (load_file(folder / where / name / "adapter_model.safetensors") for where in ("single", layout))
        assert one.keys() == two.keys()
        for key in one:
            assert two[key].numel()
            torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=0, msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp-mixed", "fsdp-mixed-layers"])
def test_mixed_precision(layout: str, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, wanted = alone
    found = step(layout, folder)
    for name in METHODS:  # bfloat16 has 8 bits; the most is rounded where whole matrices are trained
        assert found[name] == pytest.approx(wanted[name], abs=2e-2 if name == "saved" else 5e-3), name


# The command.

SMALL = ["--batch-size", "4", "--steps", "8", "--save-every", "4", "--eval-every", "4", "--log-every", "1",
         "--held-out", "8", "--samples", "1", "--r", "4"]  # fmt: skip


def train(made: Path, out: Path, *more: str) -> list[str]:  # noqa: F811
    data = ["--model", str(made / "causal"), "--data", str(made / "pairs.jsonl"), "--out", str(out)]
    return ["train", *data, *SMALL, *more]


def losses(folder: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], k): line[k] for line in lines for k in ("loss", "held_out_loss") if k in line}


def same_run(one: Path, two: Path) -> None:
    wanted, found = losses(one), losses(two)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-4), key
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=1e-5, rtol=0, msg=key)


def cut(folder: Path) -> None:
    """Leave a run as it was when killed after step 4."""
    report = json.loads((folder / "report.json").read_text())
    (folder / "before.json").write_text(json.dumps({"eval_loss": report["loss_before"]}))
    for path in [*folder.glob("report.*"), *folder.glob("adapter_*"), *folder.glob("checkpoints/checkpoint-8/*")]:
        path.unlink()


@pytest.fixture(scope="module")
def one(made: Path, tmp_path_factory: Any) -> Path:  # noqa: F811
    folder: Path = tmp_path_factory.mktemp("runs") / "one"
    run([sys.executable, "-m", "veneer", *train(made, folder)])
    return folder


def test_processes_share_a_run_and_one_goes_on_with_it(made: Path, one: Path, tmp_path: Path) -> None:  # noqa: F811
    two = tmp_path / "two"
    out = run([sys.executable, "-m", "veneer", *train(made, two, "--processes", "2")])
    assert out.count("held-out loss ") == 1  # one process reports
    assert foreign_lines(out, OF_DDP) == []
    same_run(one, two)
    cut(two)
    run([sys.executable, "-m", "veneer", *train(made, two, "--resume")])
    same_run(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3"])
def test_another_layout_goes_on(layout: str, made: Path, one: Path, tmp_path: Path) -> None:  # noqa: F811
    import shutil

    two = tmp_path / "two"
    shutil.copytree(one, two)
    cut(two)
    recipe = yaml.safe_load((two / "recipe.yaml").read_text())
    (two / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "out": str(two)}))
    run([sys.executable, "-m", "veneer", *train(made, two, "--resume", "--processes", "2", "--launch", layout)])
    same_run(one, two)
    cut(two)
    run([sys.executable, "-m", "veneer", *train(made, two, "--resume")])
    same_run(one, two)


@pytest.mark.slow
def test_fsdp2_through_accelerate(made: Path, one: Path, tmp_path: Path) -> None:  # noqa: F811
    two = tmp_path / "two"
    start = launch_command(2, "fsdp2", train(made, two), free_port())
    at = start.index("-m", 3)
    run([*start[:at], str(HERE / "fsdp_on_cpu.py"), *start[at + 2 :]])
    same_run(one, two)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on(made: Path, one: Path, tmp_path: Path) -> None:  # noqa: F811
    import psutil

    folder, whole = tmp_path / "killed", tmp_path / "whole"
    more = ["--steps", "150", "--save-every", "20", "--eval-every", "0"]
    run([sys.executable, "-m", "veneer", *train(made, whole, *more)])
    started = subprocess.Popen(
        [sys.executable, "-m", "veneer", *train(made, folder, *more, "--processes", "2")], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not list(folder.glob("checkpoints/*/trainer_state.json")):
            assert time.monotonic() < deadline and started.poll() is None
            time.sleep(0.05)
        found = [p for p in psutil.Process(started.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        found[0].kill()
        out, _ = started.communicate(timeout=90)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 2
    assert "--resume" in out and "one of the 2 processes" in out, out[-3000:]
    run([sys.executable, "-m", "veneer", *train(made, folder, *more, "--processes", "2", "--resume")])
    a, b = (json.loads((f / "report.json").read_text())["loss_after"] for f in (whole, folder))
    assert b == pytest.approx(a, abs=1e-4)


# What is refused.


def test_bad_numbers_and_layouts_are_refused() -> None:
    settings = build_run({"model": "a/b", "data": "x.jsonl", "batch_size": 6}, {})
    for processes, layout, says in (
        (4, None, "cannot share batch_size=6.*1, 2, 3, 6 processes"),
        (2, "zero", "must be one of ddp"),
        (None, "ddp", "--processes N"),
        (1, None, "leave it out"),
    ):
        with pytest.raises(InputError, match=says):
            check_launch(settings, processes, layout)
    check_launch(settings, 3, "zero3")


def test_configs_are_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert list(CONFIGS) == ["ddp", "fsdp2", "zero2", "zero3", "zero3-offload"]
    for name, path in CONFIGS.items():
        assert load_config_from_file(str(path)).num_machines == 1
        assert path.read_text().startswith("# "), name
    assert drop_options(["train", "x", "--processes", "2", "--launch=ddp", "--r", "4"], "--processes", "--launch") == [
        "train", "x", "--r", "4"]  # fmt: skip


def test_attaching_to_a_partitioned_model_is_refused() -> None:
    from small import llama

    model = llama()
    for parameter in model.parameters():
        parameter.ds_id = 0
    for module in model.modules():
        module._external_params = {}  # as deepspeed.initialize does
    with pytest.raises(RuntimeError, match=r"ZeRO-3; attach adapters before.*deepspeed.initialize"):
        veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["q_proj"]))
    assert sharding.is_partitioned(parameter)


def test_empty_tensors_are_refused(tmp_path: Path) -> None:
    from small import lora

    model = lora()
    next(p for p in model.parameters() if p.requires_grad).data = torch.empty(0)
    with pytest.raises(ValueError, match="holds no data"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
