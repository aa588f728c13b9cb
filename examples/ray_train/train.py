"""A recipe on Ray Train: `python train.py RECIPE --workers N [--steps 20 --out FOLDER ...]`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def worker(job: dict[str, Any]) -> None:
    """What each process of `veneer train` does; Ray has set RANK, WORLD_SIZE and MASTER_ADDR, and joined the group."""
    from veneer.recipes.recipe import build_run
    from veneer.recipes.recipe import read_recipe
    from veneer.recipes.train import train

    train(build_run(read_recipe(job["recipe"]), job["flags"]), overwrite=job["overwrite"])


def main(arguments: list[str]) -> None:
    recipe, *rest = arguments
    overwrite = "--overwrite" in rest
    rest = [a for a in rest if a != "--overwrite"]
    flags: dict[str, Any] = {
        k.removeprefix("--").replace("-", "_"): v for k, v in zip(rest[::2], rest[1::2], strict=True)
    }
    workers, storage = int(flags.pop("workers", 2)), flags.pop("storage", None)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"recipe": recipe, "flags": flags, "overwrite": overwrite},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=storage),
    )
    trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1:])
