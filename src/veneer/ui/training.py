"""The Train tab: a form for `veneer train`, and the run as it goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import gradio as gr
import yaml

from ..files.embedded import EMBEDDED
from ..methods.base import Method
from ..methods.registry import registry
from ..recipes.data import LANGUAGES
from ..recipes.describe_method import describe_method
from ..recipes.pictures import IMAGES
from ..recipes.ratings import RATINGS
from ..recipes.recipe import build_run
from ..recipes.run import FIELDS
from ..recipes.tasks import TASKS
from . import look
from .errors import show_errors
from .folder import Folder, check_name
from .runner import Job, Runner

ARGUMENTS = 4  # of a method, which get a field of their own
FORBIDDEN = ("out", "model", "data", "eval_data")  # of further settings: paths


def list_methods() -> dict[str, type[Method]]:
    """What a user can name."""
    return {k: c for k, c in registry().items() if not c.internal}


def method_fields(method: str) -> list[tuple[str, str, str]]:
    """Name, default and meaning of the fields that a method's own docstring begins with."""
    known: dict[str, type[Method]] = {key.lower(): cls for key, cls in list_methods().items()}
    cls = known[method]
    kept = [
        f
        for f in describe_method(cls).fields
        if f[0] not in ("exclude_modules", "modules_to_save", "layers_pattern", "layers_to_transform")
    ]
    return [(name, default, text) for name, _, default, text in kept[:ARGUMENTS]]


def shown_fields(method: str) -> list[dict[str, Any]]:
    """How the boxes for a method's fields are to look; those that it has no field for are hidden."""
    fields = method_fields(method)
    shown = [{"label": n, "placeholder": d, "info": t, "value": "", "visible": True} for n, d, t in fields]
    return shown + [{"visible": False, "value": ""} for _ in range(ARGUMENTS - len(fields))]


def flags_of(values: dict[str, Any], own: list[str], further: str) -> dict[str, Any]:
    """What the form says, as the flags of `veneer train`.

    Raises:
        ValueError: further settings that are no YAML mapping, or name a path.
    """
    flags = {k: v for k, v in values.items() if v not in (None, "")}
    method = str(flags["method"])
    for (name, _, _), value in zip(method_fields(method), own, strict=False):
        if value and value.strip():
            flags[f"method__{name}"] = value.strip()
    try:
        more = yaml.safe_load(further or "") or {}
    except yaml.YAMLError as error:
        raise ValueError(f"further settings are no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(more, dict):
        raise ValueError("further settings: write one `name: value` a line, such as `gradient_accumulation: 2`")
    known = {f.name for f in FIELDS}
    for key, value in more.items():
        if key in FORBIDDEN:
            raise ValueError(f"further settings: {key!r} is chosen above, not here")
        flags[key if key in known else f"method__{key}"] = (
            value if key in known else yaml.safe_dump(value).split("\n...")[0].strip()
        )
    return flags


def arguments_of(flags: dict[str, Any]) -> list[str]:
    """Flags as words of a command."""
    kinds = {f.name: str(f.type) for f in FIELDS}
    booleans = {
        f.name for cls in list_methods().values() for f in dataclasses.fields(cls) if f.init and str(f.type) == "bool"
    }
    words = []
    for key, value in flags.items():
        name = key.removeprefix("method__")
        option = name.replace("_", "-")
        if kinds.get(key) == "bool" or (key != name and name in booleans and str(value).lower() in ("true", "false")):
            words.append(f"--{option}" if str(value).lower() == "true" else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


def parse_integer(value: object) -> Any:
    """A number field's value: 100.0 as 100."""
    return int(value) if isinstance(value, float) and value == int(value) else value


class Training:
    """The tab.

    Args:
        folder: what the page may read and write.
        runner: runs the command.
    """

    def __init__(self, folder: Folder, runner: Runner) -> None:
        self.folder, self.runner = folder, runner
        models = [*folder.plain_models(), *EMBEDDED]
        data = [*LANGUAGES, *RATINGS, *IMAGES]
        with gr.Row():
            with gr.Column(scale=5):
                name = gr.Textbox(
                    label="Name of the run", value="my-adapter", info="its folder below the page's folder"
                )
                with gr.Row():
                    task = gr.Dropdown(list(TASKS), value="causal-lm", label="Task")
                    model = gr.Dropdown(
                        models,
                        value=models[0],
                        label="Model",
                        allow_custom_value=True,
                        info="from the list, or a hub id",
                    )
                data_name = gr.Dropdown(
                    ["", *data],
                    value="ui-en-es",
                    label="Data",
                    allow_custom_value=True,
                    info="embedded, or a datasets id; an upload below wins",
                )
                upload = gr.File(
                    label="or upload JSONL, CSV or Parquet", file_types=[".jsonl", ".csv", ".parquet"], height=140
                )
                method = gr.Dropdown(sorted(k.lower() for k in list_methods()), value="lora", label="Method")
                with gr.Row():
                    own = [gr.Textbox(min_width=190, **how) for how in shown_fields("lora")]
                with gr.Row():
                    steps = gr.Number(100, label="Steps", precision=0, minimum=1)
                    batch = gr.Number(8, label="Batch size", precision=0, minimum=1)
                    rate = gr.Textbox("", label="Learning rate", placeholder="the method's")
                with gr.Accordion("Further settings", open=False):
                    further = gr.Textbox(
                        label="one `name: value` a line",
                        lines=4,
                        placeholder="gradient_accumulation: 2\nprompt_column: question",
                        info="any setting of `veneer train`, or any field of the method",
                    )
                with gr.Row():
                    plan = gr.Button("Plan", min_width=80)
                    start = gr.Button("Start", variant="primary", min_width=80, elem_id="start")
                    stop = gr.Button("Stop", variant="stop", min_width=80)
            with gr.Column(scale=6):
                state = gr.HTML(look.format_state(None), elem_id="state")
                plot = gr.LinePlot(
                    None, x="step", y="loss", color="curve", color_map=look.COLOURS, height=330, label="Loss: training green, held out orange", elem_id="loss",
                    x_title="optimizer step", y_title="loss", color_title=" ",
                )  # fmt: skip
                figures = gr.Markdown(elem_id="figures")
                samples = gr.Dataframe(
                    headers=["prompt", "before", "after"],
                    wrap=True,
                    column_widths=["34%", "33%", "33%"],
                    interactive=False,
                    visible=False,
                    label="Samples",
                )
                zip_file = gr.DownloadButton("Download the adapter", visible=False, elem_id="download")
                command = gr.Code(label="The same in a terminal", language="shell", interactive=False, visible=False)
                planned = gr.Code(label="Plan", language=None, interactive=False, visible=False, elem_id="plan")
                with gr.Accordion("What the command prints", open=False):
                    log = gr.Code(language=None, interactive=False, show_label=False, max_lines=24)
        inputs = [name, task, model, data_name, upload, method, *own, steps, batch, rate, further]
        method.change(lambda m: [gr.update(**how) for how in shown_fields(m)], method, own, show_progress="hidden")
        start.click(self.start, inputs, [command])
        stop.click(show_errors(runner.stop), None, None)
        plan.click(self.plan, inputs, planned)
        seen = gr.State("")
        timer = gr.Timer(1.0)
        timer.tick(
            self.tick, seen, [seen, state, plot, figures, samples, zip_file, command, log], show_progress="hidden"
        )

    def flags(self, *given: Any) -> tuple[str, dict[str, Any]]:
        """The form's values as flags, checked as the command does.

        Raises:
            ValueError: something in them cannot be used.
        """
        name, task, model, data, upload, method, *rest = given
        own, (steps, batch, rate, further) = list(rest[:ARGUMENTS]), rest[ARGUMENTS:]
        run = check_name(name or "")
        source = self.folder.dataset(data, upload)
        values = {
            "model": self.folder.model(model),
            "data": str(self.folder.keep(source, run)) if upload else source,
            "task": task,
            "method": method,
            "steps": parse_integer(steps),
            "batch_size": parse_integer(batch),
            "learning_rate": rate,
            "log_every": max(1, int(steps or 100) // 50),
        }
        flags = flags_of(values, own, further)
        build_run({}, {**flags, "out": str(self.folder.inside(run))})
        return run, flags

    @show_errors
    def start(self, *given: object) -> Any:
        run, flags = self.flags(*given)
        folder = self.folder.inside(run)
        if (folder / "recipe.yaml").exists() or (folder / "adapter_config.json").exists():
            raise ValueError(f"{run!r} holds a run already; give this one another name")
        words = ["train", *arguments_of(flags), "--out", str(folder)]
        job = self.runner.start("train", run, words, int(flags.get("steps") or 0))
        return gr.Code(job.command, visible=True)

    @show_errors
    def plan(self, *given: object) -> Any:
        _, flags = self.flags(*given)
        names = ("task", "batch_size", "dtype", "quantize", "gradient_checkpointing", "gradient_accumulation", "method")
        kept = {k: v for k, v in flags.items() if k in names or k.startswith("method__")}
        words = ["plan", flags["model"], *arguments_of(kept), "--length", str(flags.get("max_length", 128))]
        return gr.Code(self.runner.once(words), visible=True)

    def tick(self, seen: str) -> Any:
        """What has changed since the last look, for the job that is or was of this tab."""
        job = self.runner.job
        if job is None or job.kind != "train":
            return [gr.skip()] * 8
        now = format_version(job)
        if now == seen and job.state != "running":
            return [gr.skip()] * 8
        ready = job.state == "finished"
        rows = look.format_samples(job.folder) if ready else []
        return [
            now,
            look.format_state(job),
            look.draw_curve(job.folder) if now != seen else gr.skip(),
            look.format_figures(job.folder) if ready else "",
            gr.Dataframe(rows, visible=bool(rows)),
            gr.DownloadButton(value=str(self.folder.zipped(job.name)), visible=True)
            if ready
            else gr.DownloadButton(visible=False),
            gr.Code(job.command, visible=True),
            "\n".join(job.printed().splitlines()[-200:]),
        ]


def format_version(job: Job) -> str:
    """Another text whenever there is something new to show."""
    path = job.folder / "metrics.jsonl"
    size = path.stat().st_size if path.is_file() else 0
    return f"{job.name} {job.started} {job.state} {size}"
