"""The commands and their flags. What they do is in the modules beside; heavy imports happen inside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..recipes.dreambooth import settings as booth
from ..recipes.errors import InputError, user_input
from ..recipes.models import QUANTIZED
from ..recipes.recipe import build_run, read_recipe
from ..recipes.run import FIELDS, HELP
from ..recipes.tasks import TASKS

force = click.option(
    "--force", is_flag=True, help="use ADAPTER although it is of another base model or does not fit; says what is wrong"
)


class LazyMethodFlags(click.Command):
    """A command with one flag for every field of every method's config."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if "--" not in self.__dict__:
            self.__dict__["--"] = [*self.params, *method_flags({p.name for p in self.params})]
        known = super().get_params(ctx)
        return [*known[:-1], *self.__dict__["--"][len(self.params) :], known[-1]]


def method_flags(taken: set[str | None]) -> list[click.Parameter]:
    """`--lora-alpha` and its like. Values are YAML, checked by the config itself."""
    from ..methods.config_file import field_types
    from ..methods.registry import METHODS

    owners: dict[str, list[str]] = {}
    flags: dict[str, bool] = {}
    for peft_type, cls in METHODS.items():
        for name, kind in field_types(cls).items():
            if name not in (*COMMON, *taken):
                owners.setdefault(name, []).append(peft_type.lower())
                flags[name] = flags.get(name, True) and kind is bool
    made: list[click.Parameter] = []
    for name, methods in owners.items():
        option = f"--{name.replace('_', '-')}"
        text = f"field of {', '.join(methods)}"
        if flags[name]:
            made.append(click.Option([f"{option}/--no{option[1:]}", f"method__{name}"], default=None, help=text))
        else:
            made.append(click.Option([option, f"method__{name}"], metavar="YAML", help=text))
    return made


COMMON = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="veneer")
def app() -> None:
    """Fine-tune large pretrained models by training a thin layer on frozen weights."""


def run_flags(fields: Any, texts: dict[str, str]) -> Callable[[Any], Any]:
    """One flag for every field of a run."""

    def add(command: Any) -> Any:
        for f in reversed(fields):
            if f.name == "method":
                command = click.option("--method", metavar="NAME", help=texts[f.name])(command)
                continue
            option = f"--{f.name.replace('_', '-')}"
            if f.type == "bool":
                command = click.option(f"{option}/--no{option[1:]}", f.name, default=None, help=texts[f.name])(command)
            else:
                command = click.option(option, f.name, metavar="VALUE", help=texts[f.name])(command)
        return command

    return add


@app.command(cls=LazyMethodFlags)
@click.argument("recipe", required=False, metavar="[RECIPE]")
@run_flags(FIELDS, HELP)
@click.option("--resume", is_flag=True, help="continue an interrupted run from its last checkpoint")
@click.option("--overwrite", is_flag=True, help="replace an earlier run in the same folder")
@click.option("--processes", type=click.IntRange(1), metavar="N", help="run on N processes of this machine")
@click.option(
    "--launch",
    "layout",
    metavar="LAYOUT",
    help="how they share the work: ddp, fsdp2, zero2, zero3 or zero3-offload [default: ddp]",
)
def train(
    recipe: str | None, resume: bool, overwrite: bool, processes: int | None, layout: str | None, **flags: object
) -> None:
    """Fine-tune a model.

    RECIPE is a YAML file, or the name of a packaged recipe such as demo-en-es. Flags win over it.
    """
    with user_input():
        given = read_recipe(recipe) if recipe else {}
        run = build_run(given, flags)
    if processes is not None or layout is not None:
        from ..recipes.launch import check_launch, drop_options, launch_processes

        check_launch(run, processes, layout)
        launch_processes(processes or 1, layout or "ddp", drop_options(sys.argv[1:], "--processes", "--launch"))
        return
    from ..recipes.train import process_rank
    from ..recipes.train import train as start

    start(run, resume=resume, overwrite=overwrite)
    if process_rank()[1] > 1:
        from ..recipes.launch import leave_process

        leave_process()


@app.command()
@run_flags(booth.FIELDS, booth.HELP)
@click.option("--resume", is_flag=True, help="continue an interrupted run from its last checkpoint")
@click.option("--overwrite", is_flag=True, help="replace an earlier run in the same folder")
@click.option("--plan", "planned", is_flag=True, help="say what memory it takes, and do nothing")
@click.option("--gpu", metavar="SIZE", help="with --plan: memory of the device, such as 11GB")
def dreambooth(resume: bool, overwrite: bool, planned: bool, gpu: str | None, **flags: object) -> None:
    """Teach a Stable Diffusion model a subject from a few images.

    UNet, and the text encoder if asked for, learn a LoRA that diffusers' `load_lora_weights` reads. With --class-prompt
    the model's own images of the subject's class keep it from forgetting the class (prior preservation).
    """
    with user_input():
        run = booth.build_run(flags)
    if planned:
        from ..recipes.dreambooth.plan import show_plan

        show_plan(run, gpu)
        return
    from ..recipes.dreambooth.train import train as start

    start(run, resume=resume, overwrite=overwrite)


@app.command()
@click.argument("model")
@click.option("--adapter", metavar="FOLDER", help="adapter to put on the model; folder or hub id")
@click.option(
    "--prompt",
    "-p",
    "prompts",
    multiple=True,
    help="text to continue or to classify, \\n for a new line; a question; path of an image or a sound; may be given several times",
)
@click.option(
    "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="file with one prompt a line"
)
@click.option("--context", metavar="TEXT", help="what the answer to a question stands in, for question-answering")
@click.option("--task", type=click.Choice(list(TASKS)), help="default: the adapter's, else causal-lm")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy")
@click.option("--quantize", type=click.Choice(QUANTIZED), help="storage of linear layers, by bitsandbytes")
@click.option("--chat", is_flag=True, help="wrap each prompt in the model's chat template")
@force
@click.option("--seed", type=int, default=0, show_default=True)
def generate(model: str, adapter: str | None, prompts: tuple[str, ...], file: Path | None, **options: Any) -> None:
    """Ask MODEL, with or without an adapter: continue prompts, or say the class, the words or the answer.

    Prompts can also come on standard input, one a line.
    """
    texts = [*prompts, *(file.read_text("utf-8").splitlines() if file else [])]
    if not texts and not sys.stdin.isatty():
        texts = sys.stdin.read().splitlines()
    texts = [t.replace("\\n", "\n") for t in texts if t.strip()]
    if not texts:
        raise InputError("no prompt was given; use --prompt TEXT, --file FILE, or pipe prompts in, one a line")
    from .generate import answer_prompts as start

    start(model, adapter, texts, **options)


@app.command()
@click.argument("model")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice([*TASKS]), help="default: the adapter's, else causal-lm")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="of what is written; default: float32, and bfloat16 where MODEL is quantized",
)
@click.option(
    "--quantize",
    type=click.Choice(QUANTIZED),
    help="storage that MODEL had when ADAPTER was trained; it is dequantized as it was, and ADAPTER merged into that",
)
@force
@click.option("--gguf", type=click.Path(path_type=Path), metavar="FILE", help="write a GGUF file for llama.cpp too")
def merge(model: str, adapter: str, out: Path, **options: Any) -> None:
    """Bake ADAPTER into MODEL and write a plain model to the folder OUT.

    A quantized MODEL becomes a plain one, of the values with which it computed; how far its outputs move is measured.
    """
    from .merge import merge_adapter as start

    start(model, adapter, out, **options)


@app.command()
@click.argument("adapter")
@click.option("--all", "everything", is_flag=True, help="list every tensor, not one line a module name")
@click.option("--check", is_flag=True, help="read the tensors and flag those that are not finite or all zero")
def inspect(adapter: str, everything: bool, check: bool) -> None:
    """Show what is in ADAPTER, a folder or hub id, without loading a model."""
    from .inspect import inspect_adapter as start

    with user_input():
        start(adapter, everything, check)


@app.command()
@click.argument("adapter")
@click.option("--model", metavar="MODEL", help="base model [default: the one that ADAPTER names]")
@click.option("--task", type=click.Choice(list(TASKS)), help="default: the adapter's")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def verify(adapter: str, model: str | None, task: str | None, dtype: str) -> None:
    """Load, merge and unmerge ADAPTER in new processes and compare what the model says.

    Writes a certificate into the adapter's folder, which `inspect` shows and loading holds against the files. Exits with 0
    where all passed, 1 where something failed, 2 where it could not be looked at.
    """
    from .verify import verify_adapter as start

    if not start(adapter, model, task, dtype):
        sys.exit(1)


@app.command()
@click.argument("adapter")
@click.option("--to", type=click.Choice(["lora"]), default="lora", show_default=True, help="what it becomes")
@click.option("--rank", metavar="N", required=True, help="rank; or a fraction such as 0.95 of each change to keep")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="where it is written")
@click.option("--model", metavar="MODEL", help="base model [default: the one that ADAPTER names]")
@force
@click.option("--task", type=click.Choice(list(TASKS)), help="default: the adapter's")
def convert(adapter: str, to: str, rank: str, out: Path, model: str | None, task: str | None, force: bool) -> None:
    """Write ADAPTER, of any method that changes weights, as a LoRA, and say how near it comes."""
    from .convert import convert_adapter as start

    start(adapter, out, rank, model, task, force)


@app.command()
@click.argument("adapter", metavar="PATH")
@click.option(
    "--for", "targets", metavar="NAMES", help="of vllm,transformers,diffusers,peft [default: those it could be for]"
)
@click.option("--fix", is_flag=True, help="write a copy without what has an exact cure")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="where --fix writes [default: PATH-fixed]"
)
@click.option("--in-place", is_flag=True, help="let --fix replace the files of PATH")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="dtype that the tensors are to have"
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def doctor(
    adapter: str, targets: str | None, fix: bool, out: Path | None, in_place: bool, dtype: str | None, as_json: bool
) -> None:
    """Say whether the adapter in PATH loads elsewhere, why not, and what to do.

    Exits with 0 where it does, 1 where it does not, 2 where PATH holds no adapter.
    """
    from .doctor import examine_adapter as start

    start(adapter, targets, fix, out, in_place, dtype, as_json)


@app.command()
@click.option("--folder", type=click.Path(path_type=Path), default="runs", show_default=True, help="where runs are")
@click.option("--models", type=click.Path(path_type=Path), metavar="FOLDER", help="folder whose models are offered too")
@click.option("--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0 is all of them")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
def ui(folder: Path, models: Path | None, host: str, port: int) -> None:
    """Open a page in the browser to train, try and download adapters.

    It reads and writes in --folder alone, and listens on this machine alone unless --host says otherwise.
    """
    from ..ui.server import serve_page

    serve_page(folder, models, host, port)


@app.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or the fields of the method NAME."""
    from .methods import show_methods as start

    with user_input():
        start(name)


@app.command(cls=LazyMethodFlags)
@click.argument("model")
@click.option("--method", metavar="NAME", default="lora", show_default=True, help="the method, or full")
@click.option("--gpu", metavar="SIZE", help="memory of the device, such as 11GB; says whether it fits and what would")
@click.option("--task", metavar="NAME", help="causal-lm, seq2seq-lm or classification [default: what the model is]")
@click.option("--batch-size", type=int, help="rows of a micro-batch [default: 8]")
@click.option("--length", type=int, help="tokens of a row [default: 128]")
@click.option("--target-length", type=int, help="tokens of a row's labels, for a model with a decoder [default: 32]")
@click.option("--dtype", metavar="NAME", help="dtype of the frozen model [default: float32]")
@click.option("--optimizer", metavar="NAME", help="adamw, adamw-8bit or sgd [default: adamw]")
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="compute blocks again in backward"
)
@click.option("--gradient-accumulation", type=int, help="micro-batches of an optimizer step [default: 1]")
@click.option("--quantize", metavar="KIND", help="int8 or nf4")
@click.option("--zero", type=int, metavar="STAGE", help="DeepSpeed's stage 2 or 3")
@click.option("--fsdp/--no-fsdp", default=None, help="PyTorch's FSDP2")
@click.option("--offload", metavar="WHERE", help="cpu: what is sharded lives in host memory; needs --zero or --fsdp")
@click.option("--processes", type=int, help="processes of the run, one a device [default: 1]")
@click.option("--device", metavar="KIND", help="cuda or cpu [default: cuda]")
@click.option("--attention", metavar="KIND", help="sdpa or eager [default: the model's]")
@click.option("--json", "as_json", is_flag=True, help="print JSON, sizes in bytes")
def plan(model: str, method: str, gpu: str | None, as_json: bool, **given: object) -> None:
    """Say what fine-tuning MODEL needs, without loading it.

    MODEL is a folder with a config.json, an embedded model, a hub id, or a name whose shapes are shipped, such as
    t0_3b or llama-3-8b.
    """
    import yaml

    from .plan import plan_model

    own = {
        k.removeprefix("method__"): yaml.safe_load(v) if isinstance(v, str) else v
        for k, v in given.items()
        if k.startswith("method__") and v is not None
    }
    plan_model(model, method, own, gpu, as_json, {k: v for k, v in given.items() if not k.startswith("method__")})
