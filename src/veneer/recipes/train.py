"""Running a recipe on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.sharding import shape_of
from ..interop import liger
from ..io import atomic_write, locate, safe_read
from ..training.findings import WatchError
from . import data as rows_of
from .checkpoints import drop_broken, hold_run, last_checkpoint, lock_folder
from .errors import InputError, PointlessError, user_input
from .launch import check_rows
from .malloc import release_memory
from .report import Report, peak_memory, plot_losses, show_report
from .run import Run
from .tasks import TASKS
from .tasks.base import Row, Task
from .trained import NAME as TASK_NAME
from .trained import Trained

OURS = (
    locate.CONFIG_NAME,
    locate.WEIGHTS_NAME,
    TASK_NAME,
    "metrics.jsonl",
    "loss.png",
    "report.json",
    "report.md",
    "recipe.yaml",
)


def train(run: Run, *, resume: bool = False, overwrite: bool = False) -> Report:
    """Fine-tune, measure before and after, and leave adapter, metrics, plot and report in the run's folder.

    Raises:
        InputError: input that cannot be used, or a folder that holds another run.
    """
    with hold_run(run.folder) as held:
        return run_it(run, resume, overwrite, held)


@dataclass
class _Loaded:
    """What a run has loaded before an adapter is attached; rows are encoded."""

    purpose: Trained
    processor: Any
    train_rows: list[Row]
    held_out: list[Row]
    folder: Path
    arguments: Any
    base: Any


def run_it(run: Run, resume: bool, overwrite: bool, held: ExitStack) -> Report:
    """See `train`; `held` is left when it ends, and with it the run's folder is free."""
    from rich.console import Console

    rank, processes = process_rank()
    check_rows(run, processes)
    console = Console(quiet=rank > 0)
    task = TASKS[run.task]
    found = rows_of.load_data(run)
    with console.status(f"loading {run.model}"):
        loaded = _load(run, found, resume, overwrite, held if rank == 0 else None)
    folder, base, processor = loaded.folder, loaded.base, loaded.processor
    model = _attach_adapter(run, loaded)
    sizes = _announce(run, loaded, model, console)

    answered = found.held_out if task.scored(run) else found.held_out[: run.samples]
    prompts = task.asked(run, answered, processor)
    started = time.perf_counter()
    checkpoint = last_checkpoint(folder) if resume else None
    says_before: list[str] = []
    before: dict[str, float] = {}

    def measure() -> None:
        """When all is in place for the first step, so that sharded layers find their weights."""
        with console.status("measuring before training"):
            with model.disable_adapter():  # the base model itself, also when a run is resumed
                says_before.extend(task.answers(run, base, processor, answered))
            if checkpoint is None:
                before.update(trainer.evaluate())
                before.update(task.scores(run, answered, says_before) if task.scored(run) else {})
        if checkpoint is not None:
            before.update(safe_read.json_object(folder / "before.json", nan=True))
            console.print(f"resuming from {checkpoint}")
        elif rank == 0:
            atomic_write.save_text(folder / "before.json", json.dumps(before))

    from .adapter_trainer import make_trainer

    rows = (loaded.train_rows, loaded.held_out)
    trainer = make_trainer(run, loaded.arguments, model, processor, *rows, folder, console, measure)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except WatchError as error:
        raise PointlessError(f"{error}\n(--no-watch trains all the same)") from error
    with console.status("measuring after training"):
        after = trainer.evaluate()
        says_after = task.answers(run, base, processor, answered)
        after.update(task.scores(run, answered, says_after) if task.scored(run) else {})
    with user_input():
        model.save_pretrained(folder, is_main_process=rank == 0)
    trainer.accelerator.wait_for_everyone()
    if rank == 0:
        loaded.purpose.save(folder)
        plot_losses(folder, "loss (nats a token)" if task.by_token else "loss")
    answers = zip(prompts, says_before, says_after, strict=True)
    report = Report(
        run=dataclasses.asdict(run),
        loss_before=before["eval_loss"],
        loss_after=after["eval_loss"],
        accuracy_before=before.get("eval_accuracy"),
        accuracy_after=after.get("eval_accuracy"),
        measured={k.removeprefix("eval_"): (before[k], after[k]) for k in after if k in before and is_measure(k)},
        samples=[{"prompt": p, "before": b, "after": a} for p, b, a in answers][: run.samples],
        **sizes,
        adapter_bytes=(folder / locate.WEIGHTS_NAME).stat().st_size,
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
    )
    if rank == 0:
        report.save(folder)
        (folder / "before.json").unlink(missing_ok=True)
        show_report(console, report, folder)
    if processes > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
    return report


def _load(run: Run, found: rows_of.Data, resume: bool, overwrite: bool, held: ExitStack | None) -> _Loaded:
    """Encode a run's rows, take its folder and load its base model, in the order in which errors cost least."""
    import torch
    import transformers

    import veneer

    if run.quantize is not None and not torch.accelerator.is_available():
        release_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(run.seed)
    task = TASKS[run.task]
    processor = task.processor(run)
    train_rows, held_out = (task.encode(run, r, processor, found.labels) for r in (found.train, found.held_out))
    # Only now, so that data which cannot be used replace no earlier run.
    folder = prepare_folder(run, resume, overwrite, held)
    # Before the model: under ZeRO-3 each process then keeps its part of the weights only, as they are read.
    arguments = training_arguments(run, len(train_rows), folder)
    purpose = Trained(run.task, tuple(found.labels), run.image_size)
    base = purpose.load(run.model, run.dtype, run.quantize)
    if getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if run.quantize is not None:
        veneer.prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=run.gradient_checkpointing, **checkpointing
        )
    elif run.gradient_checkpointing:
        base.gradient_checkpointing_enable(**checkpointing)
    return _Loaded(purpose, processor, train_rows, held_out, folder, arguments, base)


def _attach_adapter(run: Run, loaded: _Loaded) -> Any:
    """Attach the run's adapter to its base model, with the task's head trained whole."""
    import veneer

    base, heads = loaded.base, TASKS[run.task].heads
    with user_input():
        config = run.config().replace(base_model_name_or_path=run.model)
        trained = [n for n, _ in base.named_children() if n in heads] or [n for n in heads if has_module(base, n)]
        if trained and hasattr(config, "modules_to_save") and not config.modules_to_save:
            config = config.replace(modules_to_save=trained)
        model = veneer.get_peft_model(base, config)
        model.runtime.note_tokenizer(loaded.processor)
        keep_statistics(base)
        if run.liger:
            loaded.arguments.use_liger_kernel = True
            loaded.arguments.liger_kernel_config = liger.loss_only(base)
    return model


def _announce(run: Run, loaded: _Loaded, model: Any, console: Any) -> dict[str, int]:
    """Say how much is trained and on how much; return the sizes as fields of the report."""
    trained, total = model.get_nb_trainable_parameters()
    console.print(
        f"{run.model}: {len(loaded.train_rows)} rows to train on, {len(loaded.held_out)} held out; "
        f"adapter {model.peft_config['default'].peft_type}"
    )
    if not console.quiet:
        model.print_trainable_parameters()
    # What attaching added has a colon in its name.
    held = (shape_of(p).numel() * p.element_size() for n, p in loaded.base.named_parameters() if ":" not in n)
    return {"trained_parameters": trained, "all_parameters": total, "model_bytes": sum(held)}


def is_measure(key: str) -> bool:
    """Whether a figure of Trainer's is of the model, and not of the time it took or the loss, which is apart."""
    return key.startswith("eval_") and not key.endswith(("_loss", "_runtime", "_per_second", "_preparation_time"))


def has_module(base: Any, name: str) -> bool:
    """Whether a module somewhere in a model has this name."""
    return any(n.rpartition(".")[2] == name for n, _ in base.named_modules())


def keep_statistics(base: Any) -> None:
    """Frozen batch norms keep the means and variances of their pretraining, as the adapter's files hold none."""
    import torch

    for module in base.modules():
        frozen = all(not p.requires_grad for p in module.parameters())
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and frozen:
            module.eval()
            vars(module)["train"] = lambda mode=True, module=module: module  # Trainer's model.train() leaves it so


def process_rank() -> tuple[int, int]:
    """The rank of this process and how many there are, as the launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def prepare_folder(run: Run, resume: bool, overwrite: bool, held: ExitStack | None) -> Path:
    """The run's folder, without anything of another run in it; made by the process that is to write, and `held` by it."""
    import yaml

    folder = run.folder
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite replaces it; give one of them")
    if folder.is_file():
        raise InputError(f"out={str(folder)!r} is a file; give a folder")
    started = (folder / "recipe.yaml").is_file()
    finished = (folder / "report.json").is_file()
    if resume:
        if finished:
            raise InputError(f"{folder} holds a finished run; there is nothing to resume (see {folder / 'report.md'})")
        if last_checkpoint(folder) is None:
            raise InputError(f"{folder} holds no checkpoint to resume from; start it without --resume")
        before = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
        now = json.loads(json.dumps(dataclasses.asdict(run)))
        free = ("out", "samples", "max_new_tokens", "save_every", "log_every", "watch")
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            k = changed[0]
            raise InputError(
                f"--resume: {k} is {now[k]!r} now and was {before.get(k)!r}; resume with the run's own recipe"
            )
        if held is not None:
            held.enter_context(lock_folder(folder))
            drop_broken(folder)
        return folder
    if held is None:  # the first process complains, and may have made its files by now
        return folder
    if (started or finished) and not overwrite:
        what = "a finished run" if finished else "an unfinished run"
        remedy = "" if finished else "--resume to continue it, "
        raise InputError(f"{folder} holds {what}; use {remedy}--overwrite to replace it, or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock_folder(folder))
    if overwrite:
        for name in OURS:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(run))), sort_keys=False, allow_unicode=True)
    atomic_write.save_text(folder / "recipe.yaml", text)
    return folder


def training_arguments(run: Run, rows: int, folder: Path) -> Any:
    """A run with some rows to train on, as Trainer's arguments."""
    import torch
    from transformers import TrainingArguments

    cpu, processes = not torch.accelerator.is_available(), process_rank()[1]
    # accelerate runs these on CPUs only where it is not told that they are what it runs on
    sharding = "true" in (os.environ.get("ACCELERATE_USE_DEEPSPEED"), os.environ.get("ACCELERATE_USE_FSDP"))
    per_step = run.batch_size * run.gradient_accumulation
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=run.steps or math.ceil(math.ceil(rows / per_step) * run.epochs),
        per_device_train_batch_size=run.batch_size,  # of all processes, which split it
        accelerator_config={"split_batches": True},
        use_cpu=cpu and not sharding,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.scheduler,
        warmup_steps=run.warmup,
        weight_decay=run.weight_decay,
        logging_steps=run.log_every,
        eval_strategy="steps" if run.eval_every else "no",
        eval_steps=run.eval_every or None,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        save_total_limit=2,
        prediction_loss_only=type(TASKS[run.task]).metrics is Task.metrics,
        disable_tqdm=True,
        report_to=[],
        seed=run.seed,
        data_seed=run.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="group_by_length" if TASKS[run.task].by_length else "random",
    )
