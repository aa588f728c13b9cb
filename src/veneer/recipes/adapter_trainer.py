"""transformers' Trainer on an adapted base model: its checkpoints hold the adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer

from ..files import adapter_files, state_dict
from ..interop.trainer import WatchCallback
from ..io import atomic_write, locate, safe_read
from ..training import optimizers
from .checkpoints import WholeCheckpoints
from .errors import InputError, user_input
from .progress import Bar, Before, Metrics
from .run import Run
from .tasks import TASKS

OPTIMIZER, SCHEDULE = "adapter_optimizer.safetensors", "adapter_schedule.json"  # in checkpoints


def make_trainer(
    run: Run, arguments: Any, adapted: Any, processor: Any, train_rows: Any, held_out: Any, folder: Path,
    console: Any, measure: Callable[[], None],
) -> Any:  # fmt: skip
    """Trainer on the adapted base model, saving and loading only the adapter; it calls `measure` before it trains."""
    task, base = TASKS[run.task], adapted.get_base_model()
    callbacks = [Before(measure)]
    if arguments.process_index == 0:
        callbacks = [Metrics(folder / "metrics.jsonl"), *callbacks, Bar(console, arguments.max_steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base._hf_peft_config_loaded = True  # else it takes a quantized model for one that is trained itself
        trainer = AdapterTrainer(
            run,
            adapted,
            model=base,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out,
            data_collator=task.collator(run, processor, base),
            compute_metrics=None if arguments.prediction_loss_only else task.metrics,
            callbacks=callbacks,
        )
    del base._hf_peft_config_loaded
    trainer.remove_callback(transformers.PrinterCallback)
    if run.watch:
        trainer.add_callback(WatchCallback())  # after what measures before the first step
    return trainer


class AdapterTrainer(WholeCheckpoints, Trainer):
    """The base model is trained in place; its checkpoints hold the adapter."""

    def __init__(self, run: Run, adapted: Any, **options: Any) -> None:
        self._run, self._adapted, self._task = run, adapted, TASKS[run.task]
        super().__init__(**options)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Trainer averages over batches; a loss a token must not depend on how rows are batched."""
        if not self._task.by_token:
            with torch.random.fork_rng(devices=[]):  # its loader draws from what dropout draws from
                return dict(super().evaluate(*args, **kwargs))
        base = self.model
        totals = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
        was_training = base.training
        base.eval()
        rank, processes = self.args.process_index, self.args.world_size
        batches = [
            self.eval_dataset[i : i + self._run.batch_size]
            for i in range(0, len(self.eval_dataset), self._run.batch_size)
        ]
        # Every process runs as many batches, as sharded layers want it; those too many do not count.
        for i in range(rank, -(-len(batches) // processes) * processes, processes):
            inputs = self._prepare_inputs(self.data_collator(list(batches[i % len(batches)])))
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
        self._adapted.save_pretrained(target, is_main_process=first)
        state = state_dict.training_tensors(self._adapted, "default")
        if first:
            adapter_files.save_weights(state, target, name=locate.TRAINING_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Whole tensors by name, whatever the layout, so that a run can go on in another."""
        parameters = _trained_by_name(self._adapted)
        state = optimizers.read_state(self.optimizer, parameters)
        if self.args.process_index == 0:
            adapter_files.save_weights(state, output_dir, name=OPTIMIZER)
            atomic_write.save_text(Path(output_dir) / SCHEDULE, json.dumps({"steps": self.lr_scheduler.last_epoch}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Left to `_prepare_for_training`: the parameters are sharded by then."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_deepspeed_enabled:  # it wants to hear of one process's rows
            given = self.accelerator.state.deepspeed_plugin.deepspeed_config
            given["train_micro_batch_size_per_gpu"] = self._run.batch_size // self.args.world_size
            given["train_batch_size"] = self._run.batch_size * self._run.gradient_accumulation
            cpu = not torch.accelerator.is_available()
            if cpu or shutil.which("c++") is None:  # its own Adam has to be compiled, and pays beside a GPU only
                given["zero_force_ds_cpu_optimizer"] = False
        made = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return made

    def _restore(self, checkpoint: Path) -> None:
        """Parameters, optimizer and schedule of a checkpoint that any number of processes wrote."""
        if not (checkpoint / OPTIMIZER).is_file():
            raise InputError(f"{checkpoint} has no {OPTIMIZER}: an earlier version wrote it; start the run again")
        with user_input():
            state_dict.load_training_state(self._adapted, "default", checkpoint)
            parameters = _trained_by_name(self._adapted)
            optimizers.put_master(parameters, locate.read_tensors(checkpoint / locate.TRAINING_NAME))
            optimizers.write_state(self.optimizer, parameters, locate.read_tensors(checkpoint / OPTIMIZER))
        # A schedule is a function of the step; how many groups the optimizer has differs between layouts.
        schedule, steps = self.lr_scheduler, safe_read.json_object(checkpoint / SCHEDULE)["steps"]
        rates = [rate * of(steps) for rate, of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.last_epoch, schedule._step_count, schedule._last_lr = steps, steps + 1, rates
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _trained_by_name(adapted: Any) -> dict[str, Any]:
    """The parameters that an optimizer has, by the names they have in `adapter_training.safetensors`."""
    return {k: p for k, p in adapter_files.runtime_on(adapted).training_state("default").items() if p.requires_grad}
