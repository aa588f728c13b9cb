"""The commands, on tiny models that are made here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from veneer.cli.app import app
from veneer.methods.registry import METHODS  # type: ignore[attr-defined]
from veneer.recipes.data import LANGUAGES, read_rows
from words import LABELLED, PAIRS, write_models

SMALL = [
    "--batch-size",
    "4",
    "--steps",
    "6",
    "--eval-every",
    "3",
    "--save-every",
    "3",
    "--log-every",
    "1",
    "--held-out",
    "8",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    """A folder with models and data."""
    folder: Path = tmp_path_factory.mktemp("made")
    write_models(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    (folder / "labelled.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in LABELLED))
    return folder


def veneer(*arguments: Any, ok: bool = True, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    if ok:
        assert result.exit_code == 0, result.output + repr(result.exception)
    else:
        assert result.exit_code == 2, result.output + repr(result.exception)
        assert "Traceback" not in result.output
    return result


def causal(made: Path, out: Path, *more: Any, ok: bool = True) -> Result:
    where = ("--model", made / "causal", "--data", made / "pairs.jsonl", "--out", out)
    return veneer("train", *where, *SMALL, "--r", 4, "--target-modules", "all-linear", *more, ok=ok)


def test_train_generate_inspect_merge(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = causal(made, out, "--learning-rate", "2e-2", "--steps", 30)
    assert "held-out loss" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"] and report["steps"] == 30
    assert len(report["samples"]) == 3 and report["adapter_bytes"] < report["model_bytes"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in (out / "report.md").read_text()
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, 31))
    assert lines[-1]["held_out_loss"] == report["loss_after"]

    plain = veneer("generate", made / "causal", "-p", "say red 1").output
    tuned = veneer("generate", made / "causal", "--adapter", out, stdin="say red 1\n").output
    assert plain != tuned
    text = veneer("inspect", out, "--check").output
    assert "LORA" in text and "q_proj.lora_A.weight" in text and "finite" in text
    veneer("merge", made / "causal", out, tmp_path / "merged")
    assert veneer("generate", tmp_path / "merged", "-p", "say red 1").output == tuned
    again = veneer("merge", made / "causal", out, tmp_path / "merged", ok=False)
    assert "not empty" in again.output
    assert "holds a finished run" in causal(made, out, ok=False).output
    causal(made, out, "--overwrite")


@pytest.mark.parametrize("method", ["ia3", "oft", "vera", "loha"])
def test_every_method_trains(made: Path, tmp_path: Path, method: str) -> None:
    more = {
        "ia3": ["--feedforward-modules", "[down_proj]"],
        "oft": ["--oft-block-size", 8],
        "vera": ["--r", 4],
        "loha": [],
    }
    where = ("--model", made / "causal", "--data", made / "pairs.jsonl", "--out", tmp_path / "run")
    veneer(
        "train", *where, *SMALL, "--method", method, "--target-modules", "[k_proj, v_proj, down_proj]", *more[method]
    )
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["peft_type"] == method.upper()


def test_seq2seq_and_classification(made: Path, tmp_path: Path) -> None:
    where = ("--model", made / "seq2seq", "--data", made / "pairs.jsonl", "--out", tmp_path / "a")
    veneer("train", *where, *SMALL, "--task", "seq2seq-lm", "--learning-rate", "1e-2")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    where = ("--model", made / "classifier", "--data", made / "labelled.csv", "--out", tmp_path / "b")
    veneer("train", *where, *SMALL, "--steps", 30, "--task", "classification", "--learning-rate", "1e-2")
    report = json.loads((tmp_path / "b/report.json").read_text())
    assert report["accuracy_after"] >= report["accuracy_before"]
    assert any("classifier" in k for k in load_file(tmp_path / "b/adapter_model.safetensors"))


class Killed(BaseException):
    """As sudden as a signal."""


NEEDS: dict[str, list[str]] = {
    "TRAINABLE_TOKENS": ["--token-indices", "[1, 4, 7]"],
    "ADAPTION_PROMPT": ["--adapter-len", "4", "--adapter-layers", "1"],
    "CPT": ["--cpt-token-ids", "[3, 4, 5]"],
    "LORA": ["--r", "4", "--lora-dropout", "0.1"],
    "OFT": ["--oft-block-size", "8"],
    "VERA": ["--r", "4"],
    "LOHA": ["--r", "4"],
    "BITFIT": ["--model", "opt"],
    "P_TUNING": ["--encoder-reparameterization-type", "LSTM", "--encoder-hidden-size", "8", "--encoder-dropout", "0.1"],
    "PREFIX_TUNING": ["--prefix-projection"],
}


@pytest.mark.parametrize("name", [n for n in METHODS if n != "ADAPTER_FUSION"])  # which needs other adapters first
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of every method, on its own training defaults but for the rate; bit for bit."""
    from veneer.recipes.progress import Bar

    needs = [str(made / n) if n == "opt" else n for n in NEEDS.get(name, [])]
    model = [] if "--model" in needs else ["--model", str(made / "causal")]
    options = [*model, *SMALL, "--data", str(made / "pairs.jsonl"), "--method", name.lower(), *needs]
    options += ["--learning-rate", "1e-2"]
    veneer("train", *options, "--out", tmp_path / "whole")
    step_end = Bar.on_step_end

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed
        step_end(self, args, state, control, **kwargs)

    cut = [*options, "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "on_step_end", die)
        with pytest.raises(Killed):
            CliRunner().invoke(app, ["train", *cut])
    assert "unfinished run" in veneer("train", *cut, ok=False).output
    other = [x if x != "1e-2" else "2e-2" for x in cut]
    assert "learning_rate is" in veneer("train", *other, "--resume", ok=False).output
    veneer("train", *cut, "--resume")
    one, two = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("whole", "cut"))
    assert one and all(torch.equal(one[k], two[k]) for k in one)
    a, b = ((tmp_path / w / "metrics.jsonl").read_text().splitlines() for w in ("whole", "cut"))
    assert [x for x in a if '"loss"' in x] == [x for x in b if '"loss"' in x]
    assert "nothing to resume" in veneer("train", *cut, "--resume", ok=False).output
    said = veneer("generate", options[options.index("--model") + 1], "--adapter", tmp_path / "cut", "-p", "say red 1")
    assert said.output.strip() and name in veneer("inspect", tmp_path / "cut").output


WRONG: list[tuple[list[str], str]] = [
    (["--modle", "x"], "--model"),
    (["--lora-alfa", "3"], "--lora-alpha"),
    (["--method", "lorra"], "did you mean 'lora'"),
    (["--r", "0"], "r=0"),
    (["--r", "many"], "r='many'"),
    (["--steps", "x"], "steps='x': must be of type int"),
    (["--batch-size", "0"], "batch_size=0: must be 1 or more"),
    (["--scheduler", "linea"], "did you mean 'linear'"),
    (["--method", "ia3", "--lora-alpha", "3"], "method 'ia3' has no field 'r'"),
    (["--target-modules", "[q_prj]"], "did you mean 'q_proj'"),
    (["--prompt-column", "question"], "has the columns 'prompt', 'completion'"),
    (["--data", "nothing.jsonl"], "there is no such file"),
    (["--data", "ui-en-se"], "did you mean 'ui-en-es'"),
    (["--model", "smollm2-135"], "did you mean 'smollm2-135m'"),
    (["--held-out", "1000"], "rows to train on"),
    (["--resume"], "no checkpoint to resume from"),
    (["--resume", "--overwrite"], "give one of them"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_wrong_input(made: Path, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in causal(made, tmp_path / "run", *more, ok=False).output.replace("\n", " ")
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def test_recipes(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    values = {
        "model": str(made / "causal"),
        "data": str(made / "pairs.jsonl"),
        "out": str(tmp_path / "run"),
        "steps": 2,
    }
    path.write_text(yaml.safe_dump({**values, "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]}}))
    veneer("train", path, "--lora-alpha", 6)
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["q_proj"])
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["method"]["lora_alpha"] == 6
    for change, message in (
        ({"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"method": {"name": "lora", "ranks": 3}}, "no field 'ranks'"),
        ({"chat": "yes"}, "chat='yes'"),
        ({"data": ""}, "data is missing"),
    ):
        path.write_text(yaml.safe_dump({**values, **change}))
        assert message in veneer("train", path, ok=False).output.replace("\n", " ")
    path.write_text("model: [")
    assert "no valid YAML" in veneer("train", path, ok=False).output
    assert "packaged recipes are demo-en-es" in veneer("train", "demo", ok=False).output


def test_methods_and_help() -> None:
    from veneer.cli.app import COMMON

    text = veneer("methods").output
    assert all(name.lower() in text for name in METHODS)
    for name, cls in METHODS.items():
        said = veneer("methods", name.lower()).output
        first = next(f.name for f in dataclasses.fields(cls) if f.init and f.name not in COMMON)
        assert first[:12] in said  # a narrow terminal breaks names
    assert "did you mean 'lora'" in veneer("methods", "lorra", ok=False).output
    usage = veneer("train", "--help").output
    assert "--lora-alpha" in usage and "--use-dora" in usage and "--learning-rate" in usage


@pytest.mark.parametrize("name", LANGUAGES)
def test_embedded_translations(name: str) -> None:
    rows = read_rows(name)
    assert 700 < len(rows) < 900 and rows == read_rows(name)
    assert all(r["prompt"].startswith("English: ") and r["completion"].strip() for r in rows)


def test_inspect_says_what_is_wrong(tmp_path: Path) -> None:
    assert "no such folder" in veneer("inspect", tmp_path / "x", ok=False).output
    assert "adapter_config.json" in veneer("inspect", tmp_path, ok=False).output.replace("\n", "")
