"""Running a recipe on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..distributed.sharding import shape_of
from ..files import adapter_files, state_dict
from ..interop import liger
from ..io import atomic_write, locate, safe_read
from ..training import optimizers
from ..training.findings import WatchError
from . import data as rows_of
from .checkpoints import WholeCheckpoints, alone, drop_broken, last_checkpoint, running
from .errors import InputError, PointlessError, user_input
from .launch import check_rows
from .malloc import release_memory
from .report import Report, peak_memory, plot, show
from .run import Run
from .tasks import TASKS
from .tasks.base import Task
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


OPTIMIZER, SCHEDULE = "adapter_optimizer.safetensors", "adapter_schedule.json"  # in checkpoints


def train(run: Run, *, resume: bool = False, overwrite: bool = False) -> Report:
    """Fine-tune, measure before and after, and leave adapter, metrics, plot and report in the run's folder.

    Raises:
        InputError: input that cannot be used, or a folder that holds another run.
    """
    with running(run.folder) as held:
        return run_it(run, resume, overwrite, held)


def run_it(run: Run, resume: bool, overwrite: bool, held: ExitStack) -> Report:
    """See `train`; `held` is left when it ends, and with it the run's folder is free."""
    from rich.console import Console

    rank, processes = place()
    check_rows(run, processes)
    console = Console(quiet=rank > 0)
    task = TASKS[run.task]
    found = rows_of.load(run)
    import torch
    import transformers

    import veneer

    if run.quantize is not None and not torch.accelerator.is_available():
        release_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(run.seed)
    with console.status(f"loading {run.model}"):
        processor = task.processor(run)
        train_rows = task.encode(run, found.train, processor, found.labels)
        held_out = task.encode(run, found.held_out, processor, found.labels)
        # Only now, so that data which cannot be used replace no earlier run.
        folder = prepare_folder(run, resume, overwrite, held if rank == 0 else None)
        # Before the model: under ZeRO-3 each process then keeps its part of the weights only, as they are read.
        arguments = settings(run, len(train_rows), folder)
        purpose = Trained(run.task, tuple(found.labels), run.image_size)
        base = purpose.load(run.model, run.dtype, run.quantize)
        if getattr(base.config, "pad_token_id", None) is None:
            base.config.pad_token_id = getattr(getattr(processor, "tokenizer", processor), "pad_token_id", None)
        if run.quantize is not None:
            veneer.prepare_model_for_kbit_training(
                base,
                use_gradient_checkpointing=run.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
            )
        elif run.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with user_input():
        config = run.config().replace(base_model_name_or_path=run.model)
        heads = [n for n, _ in base.named_children() if n in task.heads] or [
            n for n in task.heads if has_module(base, n)
        ]
        if heads and hasattr(config, "modules_to_save") and not config.modules_to_save:
            config = config.replace(modules_to_save=heads)
        model = veneer.get_peft_model(base, config)
        model.runtime.note_tokenizer(processor)
        keep_statistics(base)
        if run.liger:
            arguments.use_liger_kernel, arguments.liger_kernel_config = True, liger.loss_only(base)
    trained, total = model.get_nb_trainable_parameters()
    model_bytes = sum(shape_of(p).numel() * p.element_size() for n, p in base.named_parameters() if ":" not in n)
    console.print(
        f"{run.model}: {len(train_rows)} rows to train on, {len(held_out)} held out; adapter {config.peft_type}"
    )
    if rank == 0:
        model.print_trainable_parameters()

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

    trainer = make_trainer(run, arguments, model, processor, train_rows, held_out, folder, console, measure)
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
        purpose.save(folder)
        plot(folder, "loss (nats a token)" if task.by_token else "loss")
    report = Report(
        run=dataclasses.asdict(run),
        loss_before=before["eval_loss"],
        loss_after=after["eval_loss"],
        accuracy_before=before.get("eval_accuracy"),
        accuracy_after=after.get("eval_accuracy"),
        measured={k.removeprefix("eval_"): (before[k], after[k]) for k in after if k in before and measures(k)},
        samples=[
            {"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, says_before, says_after, strict=True)
        ][: run.samples],
        trained_parameters=trained,
        all_parameters=total,
        adapter_bytes=(folder / locate.WEIGHTS_NAME).stat().st_size,
        model_bytes=model_bytes,
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_memory(),
    )
    if rank == 0:
        report.save(folder)
        (folder / "before.json").unlink(missing_ok=True)
        show(console, report, folder)
    if processes > 1:
        import torch.distributed as dist

        dist.destroy_process_group()
    return report


def measures(key: str) -> bool:
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


def place() -> tuple[int, int]:
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
            held.enter_context(alone(folder))
            drop_broken(folder)
        return folder
    if held is None:  # the first process complains, and may have made its files by now
        return folder
    if (started or finished) and not overwrite:
        what = "a finished run" if finished else "an unfinished run"
        remedy = "" if finished else "--resume to continue it, "
        raise InputError(f"{folder} holds {what}; use {remedy}--overwrite to replace it, or another --out")
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(alone(folder))
    if overwrite:
        for name in OURS:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(run))), sort_keys=False, allow_unicode=True)
    atomic_write.save_text(folder / "recipe.yaml", text)
    return folder


def trained_by_name(adapted: Any) -> dict[str, Any]:
    """The parameters that an optimizer has, by the names they have in `adapter_training.safetensors`."""
    return {k: p for k, p in adapter_files.attached(adapted).training_state("default").items() if p.requires_grad}


def settings(run: Run, rows: int, folder: Path) -> Any:
    """A run with some rows to train on, as Trainer's arguments."""
    import torch
    from transformers import TrainingArguments

    cpu, processes = not torch.accelerator.is_available(), place()[1]
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


def make_trainer(
    run: Run, arguments: Any, adapted: Any, processor: Any, train_rows: Any, held_out: Any, folder: Path,
    console: Any, measure: Callable[[], None],
) -> Any:  # fmt: skip
    """Trainer on the adapted base model, saving and loading only the adapter; it calls `measure` before it trains."""
    import torch
    import transformers
    from transformers import Trainer

    from ..interop.trainer import WatchCallback
    from .progress import Bar, Before, Metrics

    class AdapterTrainer(WholeCheckpoints, Trainer):  # type: ignore[misc]
        """The base model is trained in place; its checkpoints hold the adapter."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            """Trainer averages over batches; a loss a token must not depend on how rows are batched."""
            if not task.by_token:
                with torch.random.fork_rng(devices=[]):  # its loader draws from what dropout draws from
                    return dict(super().evaluate(*args, **kwargs))
            base = self.model
            totals = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
            was_training = base.training
            base.eval()
            rank, processes = self.args.process_index, self.args.world_size
            batches = [held_out[i : i + run.batch_size] for i in range(0, len(held_out), run.batch_size)]
            # Every process runs as many batches, as sharded layers want it; those too many do not count.
            for i in range(rank, -(-len(batches) // processes) * processes, processes):
                inputs = self._prepare_inputs(collator(list(batches[i % len(batches)])))
                labels = inputs["labels"]
                scored = labels if base.config.is_encoder_decoder else labels[:, 1:]
                with torch.no_grad():
                    loss = float(base(**inputs).loss)
                if i < len(batches):
                    n = int((scored != -100).sum())
                    totals += torch.tensor([loss * n, n], dtype=torch.float64)
            summed, tokens = self.accelerator.reduce(totals.to(self.args.device)).tolist()
            base.train(was_training)
            metrics = {"eval_loss": summed / max(tokens, 1)}
            self.log(dict(metrics))
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Every process takes part, as tensors may be sharded; the first writes."""
            target, first = Path(output_dir or self.args.output_dir), self.args.process_index == 0
            adapted.save_pretrained(target, is_main_process=first)
            state = state_dict.training_tensors(adapted, "default")
            if first:
                adapter_files.save_weights(state, target, name=locate.TRAINING_NAME)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            """Whole tensors by name, whatever the layout, so that a run can go on in another."""
            parameters = trained_by_name(adapted)
            state = optimizers.read(self.optimizer, parameters)
            if self.args.process_index == 0:
                adapter_files.save_weights(state, output_dir, name=OPTIMIZER)
                atomic_write.save_text(Path(output_dir) / SCHEDULE, json.dumps({"steps": self.lr_scheduler.last_epoch}))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """Left to `_prepare_for_training`: the parameters are sharded by then."""

        def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
            if self.is_deepspeed_enabled:  # it wants to hear of one process's rows
                given = self.accelerator.state.deepspeed_plugin.deepspeed_config
                given["train_micro_batch_size_per_gpu"] = run.batch_size // self.args.world_size
                given["train_batch_size"] = run.batch_size * run.gradient_accumulation
                cpu = not torch.accelerator.is_available()
                if cpu or shutil.which("c++") is None:  # its own Adam has to be compiled, and pays beside a GPU only
                    given["zero_force_ds_cpu_optimizer"] = False
            made = super()._prepare_for_training(max_steps, train_dataloader, None)
            if resume_from_checkpoint is not None:
                self.restore(Path(resume_from_checkpoint))
            return made

        def restore(self, checkpoint: Path) -> None:
            """Parameters, optimizer and schedule of a checkpoint that any number of processes wrote."""
            if not (checkpoint / OPTIMIZER).is_file():
                raise InputError(f"{checkpoint} has no {OPTIMIZER}: an earlier version wrote it; start the run again")
            with user_input():
                state_dict.load_training_state(adapted, "default", checkpoint)
                parameters = trained_by_name(adapted)
                optimizers.put_master(parameters, locate.read_tensors(checkpoint / locate.TRAINING_NAME))
                optimizers.write(self.optimizer, parameters, locate.read_tensors(checkpoint / OPTIMIZER))
            # A schedule is a function of the step; how many groups the optimizer has differs between layouts.
            schedule, steps = self.lr_scheduler, safe_read.json_object(checkpoint / SCHEDULE)["steps"]
            rates = [rate * of(steps) for rate, of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
            schedule.last_epoch, schedule._step_count, schedule._last_lr = steps, steps + 1, rates
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    task, base = TASKS[run.task], adapted.get_base_model()
    collator = task.collator(run, processor, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base._hf_peft_config_loaded = True  # else it takes a quantized model for one that is trained itself
        trainer = AdapterTrainer(
            model=base,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out,
            data_collator=collator,
            compute_metrics=None if arguments.prediction_loss_only else task.metrics,
            callbacks=[Metrics(folder / "metrics.jsonl"), Before(measure), Bar(console, arguments.max_steps)]
            if place()[0] == 0
            else [Before(measure)],
        )
    del base._hf_peft_config_loaded
    trainer.remove_callback(transformers.PrinterCallback)
    if run.watch:
        trainer.add_callback(WatchCallback())  # after what measures before the first step
    return trainer
