"""The DreamBooth tab: a form for `veneer dreambooth`, and its images as they come."""

from __future__ import annotations

import shutil
from typing import Any

import gradio as gr
from PIL import Image

from ..recipes.dreambooth.settings import FIELDS, build_run
from . import look
from .errors import show_errors
from .folder import Folder, check_name
from .runner import Runner
from .training import format_version, parse_integer

DEFAULTS: dict[str, Any] = {f.name: f.default for f in FIELDS}
TEXTS = {f.name: f.metadata["help"] for f in FIELDS}


class Booth:
    """The tab."""

    def __init__(self, folder: Folder, runner: Runner) -> None:
        self.folder, self.runner = folder, runner
        models = [m for m in folder.plain_models() if (folder.models / m / "model_index.json").is_file()]  # type: ignore[operator]
        hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"

        def number(name: str, label: str, precision: int | None = 0) -> Any:
            return gr.Number(
                DEFAULTS[name], label=label, precision=precision, info=TEXTS[name], minimum=0, min_width=150
            )

        with gr.Row():
            with gr.Column(scale=5):
                name = gr.Textbox(label="Name of the run", value="my-subject", elem_id="booth-name")
                model = gr.Dropdown([*models, hub], value=(models or [hub])[0], label="Model", allow_custom_value=True)
                pictures = gr.File(
                    label="Images of the subject",
                    file_count="multiple",
                    file_types=["image"],
                    height=140,
                    elem_id="pictures",
                )
                prompt = gr.Textbox(
                    label="Their prompt", placeholder="a photo of sks dog", info="with a rare word for the subject",
                    elem_id="booth-prompt",
                )  # fmt: skip
                with gr.Row():
                    steps, resolution = number("steps", "Steps"), number("resolution", "Resolution")
                    rank = number("rank", "Rank")
                with gr.Accordion("Further settings", open=False):
                    with gr.Row():
                        rate = number("learning_rate", "Learning rate", None)
                        optimizer = gr.Dropdown(["adamw", "adamw8bit"], value="adamw", label="Optimizer")
                        dtype = gr.Dropdown(
                            ["float32", "bfloat16", "float16"], value="float32", label="Frozen weights in"
                        )
                    with gr.Row():
                        text = gr.Checkbox(False, label="Text encoder too", info=TEXTS["train_text_encoder"])
                        saves = gr.Checkbox(False, label="Save memory", info=TEXTS["gradient_checkpointing"])
                    class_prompt = gr.Textbox(
                        label="Prompt of its class",
                        placeholder="a photo of a dog",
                        info="keeps the model from forgetting the class",
                    )
                    with gr.Row():
                        class_images = number("class_images", "Images of the class")
                        sample_every = number("sample_every", "Steps between samples")
                        sample_steps = number("sample_steps", "Denoising steps of a sample")
                    shown = gr.Textbox(label="Prompt of the samples", placeholder="the subject's prompt")
                with gr.Row():
                    plan = gr.Button("Plan", min_width=80)
                    start = gr.Button("Start", variant="primary", min_width=80, elem_id="booth-start")
                    stop = gr.Button("Stop", variant="stop", min_width=80)
            with gr.Column(scale=6):
                state = gr.HTML(look.format_state(None), elem_id="booth-state")
                plot = gr.LinePlot(
                    None, x="step", y="loss", color="curve", color_map=look.COLOURS, height=270, label="Denoising loss",
                    x_title="optimizer step", y_title="loss", color_title=" ",
                )  # fmt: skip
                gallery = gr.Gallery(label="Samples, the last ones first", columns=4, height=300, elem_id="samples")
                figures = gr.Markdown()
                zip_file = gr.DownloadButton("Download the adapter", visible=False, elem_id="booth-download")
                command = gr.Code(label="The same in a terminal", language="shell", interactive=False, visible=False)
                planned = gr.Code(label="Plan", language=None, interactive=False, visible=False)
        self.names = ("steps", "resolution", "rank", "learning_rate", "optimizer", "dtype", "train_text_encoder",
                      "gradient_checkpointing", "class_prompt", "class_images", "sample_every", "sample_steps",
                      "validation_prompt")  # fmt: skip
        inputs = [name, model, pictures, prompt, steps, resolution, rank, rate, optimizer, dtype, text, saves, class_prompt,
                  class_images, sample_every, sample_steps, shown]  # fmt: skip
        start.click(show_errors(self.start), inputs, command)
        plan.click(show_errors(self.plan), inputs, planned)
        stop.click(show_errors(runner.stop), None, None)
        seen = gr.State("")
        gr.Timer(1.0).tick(
            self.tick, seen, [seen, state, plot, gallery, figures, zip_file, command], show_progress="hidden"
        )

    def flags(self, *given: Any) -> tuple[str, dict[str, Any]]:
        """The form's values, checked as the command does; uploads are copied to where they stay."""
        name, model, pictures, prompt, *rest = given
        run = check_name(name or "")
        if not pictures:
            raise ValueError("upload images of the subject, three to twenty of them")
        for picture in pictures:
            try:
                with Image.open(picture) as image:
                    image.verify()
            except Exception as error:  # Pillow raises many kinds
                raise ValueError(f"{str(picture).rsplit('/', 1)[-1]} is no image that can be read: {error}") from error
        flags = {
            "model": self.folder.model(model),
            "instance_prompt": (prompt or "").strip(),
            "out": str(self.folder.inside(run)),
        }
        flags |= {
            k: parse_integer(v)
            for k, v in zip(self.names, rest, strict=True)
            if v not in (None, "") and v != DEFAULTS[k]
        }
        flags["instance_data"] = str(self.folder.keep_pictures(pictures, run))
        steps = int(flags.get("steps") or DEFAULTS["steps"])
        flags |= {"steps": steps, "log_every": max(1, steps // 50)}
        build_run(flags)
        return run, flags

    def start(self, *given: object) -> Any:
        run, flags = self.flags(*given)
        folder = self.folder.inside(run)
        if (folder / "run.json").exists() or folder.exists():
            raise ValueError(f"{run!r} exists already; give this run another name")
        job = self.runner.start("dreambooth", run, command_words("dreambooth", flags), flags["steps"])
        return gr.Code(job.command, visible=True)

    def plan(self, *given: object) -> Any:
        run, flags = self.flags(*given)
        try:
            return gr.Code(self.runner.once([*command_words("dreambooth", flags), "--plan"]), visible=True)
        finally:
            if not self.runner.busy:
                shutil.rmtree(self.folder.hidden / "uploads" / run, ignore_errors=True)

    def tick(self, seen: str) -> Any:
        job = self.runner.job
        if job is None or job.kind != "dreambooth":
            return [gr.skip()] * 7
        drawn = sorted((job.folder / "samples").glob("*.png"), reverse=True)[:16]
        now = f"{format_version(job)} {len(drawn)}"
        if now == seen and job.state != "running":
            return [gr.skip()] * 7
        changed, ready = now != seen, job.state == "finished"
        return [
            now,
            look.format_state(job),
            look.draw_curve(job.folder) if changed else gr.skip(),
            [caption_images(p) for p in drawn] if changed else gr.skip(),
            look.format_figures(job.folder) if ready else "",
            gr.DownloadButton(value=str(self.folder.zipped(job.name)), visible=True)
            if ready
            else gr.DownloadButton(visible=False),
            gr.Code(job.command, visible=True),
        ]


def caption_images(path: Any) -> tuple[Any, str]:
    """A sample image, and the step it is of."""
    with Image.open(path) as image:
        return image.convert("RGB"), f"step {int(path.stem.split('-')[0])}"


def command_words(command: str, flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command."""
    made = [command]
    for key, value in flags.items():
        option = key.replace("_", "-")
        made += (
            ([f"--{option}"] if value else [f"--no-{option}"])
            if isinstance(value, bool)
            else [f"--{option}", str(value)]
        )
    return made
