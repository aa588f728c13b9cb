"""Running DreamBooth on diffusers' pipeline and transformers' Trainer."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from ...files import state_dict
from ...io import atomic_write, safe_read
from ...training.findings import WatchError
from ..checkpoints import WholeCheckpoints, drop_broken, hold_run, last_checkpoint, lock_folder
from ..errors import InputError, PointlessError, user_input
from ..report import peak_memory, plot_losses
from . import images
from .denoiser import Denoiser, set_attention
from .settings import DreamBooth

WEIGHTS = "pytorch_lora_weights.safetensors"
OURS = (WEIGHTS, "metrics.jsonl", "loss.png", "samples.png", "report.json", "report.md", "run.json")
ADAPTER = "default"
LEVELS = 8  # of noise, on each image, when the loss is measured


def train(run: DreamBooth, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train, show samples while at it, and leave files that diffusers' `load_lora_weights` reads in the run's folder.

    Returns:
        The figures in report.json.

    Raises:
        InputError: input that cannot be used, or a folder that holds another run.
    """
    with hold_run(run.folder) as held:
        return run_it(run, resume, overwrite, held)


def run_it(run: DreamBooth, resume: bool, overwrite: bool, held: ExitStack) -> dict[str, Any]:
    """See `train`; `held` is left when it ends, and with it the run's folder is free."""
    from rich.console import Console

    import veneer

    console = Console()
    subject = images.list_images(run.instance_data)
    for path in subject:
        images.read_image(path)  # complains now, before a model is loaded
    folder = check_folder(run, resume, overwrite)
    torch.manual_seed(run.seed)
    with console.status(f"loading {run.model}"):
        pipeline = load_pipeline(run)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock_folder(folder))
    if resume:
        drop_broken(folder)
    else:
        clear_folder(run, folder)
    others = class_images(run, pipeline, console) if run.class_prompt is not None else []
    parts = {"unet": pipeline.unet, **({"text_encoder": pipeline.text_encoder} if run.train_text_encoder else {})}
    set_attention(run.attention, pipeline.unet, pipeline.vae)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False)
    with user_input():
        for name, module in parts.items():
            veneer.inject_adapter_in_model(run.config(name), module, ADAPTER)
    if run.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        if run.train_text_encoder:
            pipeline.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = Denoiser(
        pipeline.unet, pipeline.text_encoder, pipeline.vae, noise_of(pipeline), run.prior_weight, run.train_text_encoder
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    count, total = sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    console.print(
        f"{run.model}: {len(subject)} images of the subject, {len(others)} of its class; training {count:,} of {total:,} "
        f"parameters ({100 * count / total:.2f}%)"
    )
    data = images.Pairs(subject, others, run.resolution, run.center_crop, run.seed)
    loss_before = measure_loss(run, model, pipeline, data)
    trainer = make_trainer(run, model, pipeline, data, parts, folder, console)
    started = time.perf_counter()
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}")
    if checkpoint is not None:
        loss_before = safe_read.json_object(folder / "before.json", nan=True)["loss"]
    else:
        text = json.dumps({"loss": loss_before})
        atomic_write.save_text(folder / "before.json", text)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except WatchError as error:
        raise PointlessError(str(error)) from error
    save_adapter(pipeline, parts, run, folder)
    report = {
        "run": dataclasses.asdict(run),
        "loss_before": loss_before,
        "loss_after": measure_loss(run, model, pipeline, data),
        "trained_parameters": count,
        "all_parameters": total,
        "adapter_bytes": (folder / WEIGHTS).stat().st_size,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_memory(),
    }
    plot_losses(folder, "denoising loss (mean squared error)")
    show_report(run, report, folder, console)
    (folder / "before.json").unlink(missing_ok=True)
    return report


def measure_loss(run: DreamBooth, model: Denoiser, pipeline: object, data: images.Pairs) -> float:
    """The mean loss on the subject's images, cut in the middle, with the same steps and noise each time it is called."""
    device, losses = next(model.parameters()).device, []
    words = encode_prompt(pipeline, run.instance_prompt)[None].to(device)  # (1, tokens)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(run.seed)
        for image in data.subject:
            pixels = images.to_tensor(image, run.resolution)[None].to(device)  # (1, 3, side, side)
            losses += [float(model(pixels, words)["loss"]) for _ in range(LEVELS)]
    for module, training in modes:
        module.training = training
    return sum(losses) / len(losses)


def load_pipeline(run: DreamBooth) -> Any:
    """The pipeline, without a filter that would replace samples by black images.

    Raises:
        InputError: no Stable Diffusion model of the kind with one text encoder.
    """
    import transformers

    try:
        from diffusers import DiffusionPipeline, StableDiffusionPipeline
        from diffusers.utils import logging
    except ImportError as error:
        raise InputError(f"dreambooth needs diffusers ({error}); run: pip install 'veneer[diffusion]'") from error
    if not Path(run.model).is_dir() and ("/" not in run.model or run.model.startswith((".", "/", "~"))):
        raise InputError(f"model {run.model!r}: no such folder, and no hub id (owner/name)")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            run.model, torch_dtype=getattr(torch, run.dtype), safety_checker=None
        )
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"model {run.model!r} cannot be loaded by diffusers: {error}") from error
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise InputError(
            f"model {run.model!r} is a {type(pipeline).__name__}; dreambooth trains Stable Diffusion 1 and 2, pipelines "
            "of StableDiffusionPipeline with one text encoder"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def noise_of(pipeline: Any) -> Any:
    """The scheduler that adds noise in training, with the pipeline's betas.

    Raises:
        InputError: it predicts something else than noise or velocity.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"the model predicts {kind!r}; dreambooth trains models that predict epsilon or v_prediction")
    return scheduler


def check_folder(run: DreamBooth, resume: bool, overwrite: bool) -> Path:
    """The run's folder, as long as nothing in it would be lost.

    Raises:
        InputError: it holds another run; or, to resume, none or one with other settings.
    """
    folder = run.folder
    known = folder / "run.json"
    if resume:
        if last_checkpoint(folder) is None:
            raise InputError(f"--resume: {folder} has no checkpoint; leave --resume out to start")
        before = safe_read.json_object(known)
        free = (
            "out",
            "samples",
            "sample_every",
            "sample_steps",
            "validation_prompt",
            "guidance",
            "save_every",
            "log_every",
        )
        for key, value in dataclasses.asdict(run).items():
            if key not in free and before.get(key) != value:
                raise InputError(
                    f"--resume: {key} is {value!r} now and was {before.get(key)!r}; use the run's own flags"
                )
        return folder
    if known.is_file() and not overwrite:
        raise InputError(f"{folder} holds a run; use --overwrite to replace it, --resume to go on, or another --out")
    return folder


def clear_folder(run: DreamBooth, folder: Path) -> None:
    """Make the folder, without anything of another run in it."""
    for name in OURS:
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "samples"):
        shutil.rmtree(folder / name, ignore_errors=True)
    text = json.dumps(dataclasses.asdict(run), indent=2)
    atomic_write.save_text(folder / "run.json", text)


def class_images(run: DreamBooth, pipeline: Any, console: Any) -> list[Path]:
    """Images of the class; the model itself draws those that lack, one at a time, so that a stopped run keeps them."""
    from rich.progress import track

    folder = run.class_folder
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in images.SUFFIXES)
    lacking = range(len(found), run.class_images)
    for i in track(lacking, "drawing the class", console=console, disable=not lacking):
        image = draw_images(pipeline, run, str(run.class_prompt), run.seed + i)
        write_image(folder / f"drawn-{i:04}.png", image)
    return images.list_images(folder)[: run.class_images]


def write_image(path: Path, image: Any) -> None:
    atomic_write.write_atomic(path, lambda p: image.save(p, format="png"))


def draw_images(pipeline: Any, run: DreamBooth, prompt: str, seed: int) -> Any:
    """One image of a prompt, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        made = pipeline(
            prompt, num_inference_steps=run.sample_steps, guidance_scale=run.guidance, height=run.resolution,
            width=run.resolution, generator=generator,
        )  # fmt: skip
    return made.images[0]


def draw_sample(pipeline: Any, run: DreamBooth, folder: Path, step: int) -> None:
    """Draw the sample images of a step into samples/."""
    where = folder / "samples"
    where.mkdir(exist_ok=True)
    modes = [(m, m.training) for m in (pipeline.unet, pipeline.text_encoder)]
    for module, _ in modes:
        module.eval()
    for i in range(run.samples):
        image = draw_images(pipeline, run, run.validation_prompt or run.instance_prompt, run.seed + i)
        write_image(where / f"{step:06}-{i}.png", image)
    for module, training in modes:
        module.train(training)


def save_adapter(pipeline: Any, parts: dict[str, Any], run: DreamBooth, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors as diffusers does, with the configs that say alpha, all or nothing."""
    layers = {
        f"{name}_lora_layers": state_dict.get_peft_model_state_dict(m, adapter_name=ADAPTER)
        for name, m in parts.items()
    }
    configs = {f"{name}_lora_adapter_metadata": run.config(name).to_dict() for name in parts}
    whole = [{k: v.contiguous() for k, v in tensors.items()} for tensors in layers.values()]

    def write(path: Path) -> None:
        type(pipeline).save_lora_weights(
            path.parent, weight_name=path.name, **dict(zip(layers, whole, strict=True)), **configs
        )

    atomic_write.write_atomic(folder / WEIGHTS, write)


def encode_prompt(pipeline: Any, prompt: str) -> torch.Tensor:
    """A prompt's tokens, padded as the pipeline pads them: (tokens,)."""
    tokenizer = pipeline.tokenizer
    length = min(tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings)
    found = tokenizer(prompt, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    ids: torch.Tensor = found.input_ids[0]
    return ids


def make_trainer(
    run: DreamBooth, model: Denoiser, pipeline: Any, data: Any, parts: dict[str, Any], folder: Path, console: Any
) -> Any:
    """Trainer on the loss, with checkpoints that hold the adapters alone."""
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ...interop.trainer import WatchCallback
    from ..progress import Bar, Metrics

    own = encode_prompt(pipeline, run.instance_prompt)  # (tokens,)
    others = None if run.class_prompt is None else encode_prompt(pipeline, run.class_prompt)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        shown, words = [r["subject"] for r in rows], [own] * len(rows)
        if others is not None:
            shown += [r["other"] for r in rows]
            words += [others] * len(rows)
        return {"pixels": torch.stack(shown), "input_ids": torch.stack(words), "prior": others is not None}

    class AdapterTrainer(WholeCheckpoints, Trainer):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            target = Path(output_dir or self.args.output_dir)
            target.mkdir(parents=True, exist_ok=True)
            for name, module in parts.items():
                state_dict.save_training_state(module, ADAPTER, target / name)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
            with user_input():
                for name, module in parts.items():
                    state_dict.load_training_state(module, ADAPTER, Path(resume_from_checkpoint) / name)

    class Samples(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self.draw(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            if step == args.max_steps or (run.sample_every and step % run.sample_every == 0):
                self.draw(step)

        def draw(self, step: int) -> None:
            if run.samples:
                with console.status("drawing samples") if step == 0 else nullcontext():
                    draw_sample(pipeline, run, folder, step)

    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.scheduler if run.scheduler != "constant" or not run.warmup else "constant_with_warmup",
        warmup_steps=run.warmup,
        optim="adamw_torch" if run.optimizer == "adamw" else "adamw_bnb_8bit",
        logging_steps=run.log_every,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        save_total_limit=2,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=[],
        seed=run.seed,
        data_seed=run.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    with user_input():
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            callbacks=[Samples(), Bar(console, run.steps), Metrics(folder / "metrics.jsonl"), WatchCallback()],
        )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def show_report(run: DreamBooth, report: dict[str, Any], folder: Path, console: Any) -> None:
    """Write report.json, report.md and samples.png, and print the figures."""
    from PIL import Image
    from rich.table import Table

    drawn = sorted((folder / "samples").glob("*.png")) if run.samples else []
    share = 100 * report["trained_parameters"] / report["all_parameters"]
    rows = [
        (
            "denoising loss on the subject",
            f"{report['loss_before']:.4f} -> {report['loss_after']:.4f}",
        ),
        ("trained parameters", f"{report['trained_parameters']:,} of {report['all_parameters']:,} ({share:.2f}%)"),
        ("adapter size", f"{report['adapter_bytes'] / 1e6:.1f} MB"),
        ("steps", str(report["steps"])),
        ("time", f"{report['seconds']:.0f} s"),
        ("peak memory", f"{report['peak_bytes'] / 1e9:.2f} GB"),
    ]
    lines = [
        "# Report",
        "",
        f"Prompt: {run.instance_prompt}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {a} | {b} |" for a, b in rows),
    ]
    if drawn:
        first, last = drawn[: run.samples], drawn[-run.samples :]
        sheet = images.make_grid([Image.open(p) for p in (*first, *last)], run.samples)
        write_image(folder / "samples.png", sheet)
        lines += ["", "Samples before (above) and after:", "", "![samples](samples.png)"]
    lines += ["", "![loss](loss.png)", ""]
    text = json.dumps(report, indent=2)
    atomic_write.save_text(folder / "report.md", "\n".join(lines))
    atomic_write.save_text(folder / "report.json", text)
    table = Table("", "", show_header=False, title="report", title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    console.print(f"{WEIGHTS}, samples/, metrics.jsonl, loss.png and report.md are in [bold]{folder}[/]")
