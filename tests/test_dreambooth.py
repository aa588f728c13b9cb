"""`veneer dreambooth` on a tiny pipeline: what it learns, keeps, saves, and what diffusers makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

import diffusion
from veneer.cli.app import app
from veneer.recipes.dreambooth import images
from veneer.recipes.dreambooth.plan import plan_run
from veneer.recipes.dreambooth.settings import DreamBooth
from veneer.recipes.errors import InputError

QUICK = ["--resolution", "32", "--rank", "4", "--learning-rate", "1e-2", "--samples", "2", "--sample-steps", "2",
         "--log-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("diffusion")
    diffusion.pipeline(folder).save_pretrained(folder / "model")
    diffusion.images(folder / "subject", 5)
    return folder


def booth(made: Path, out: Path, *more: Any, fails: bool = False) -> str:
    base = ["--model", made / "model", "--instance-data", made / "subject", "--instance-prompt", "a photo of sks dog"]
    done = CliRunner().invoke(app, ["dreambooth", *map(str, [*base, "--out", out, *QUICK, *more])])
    assert done.exit_code == (2 if fails else 0), (done.output, done.exception)
    return " ".join(done.output.split())


def test_a_run_learns_and_diffusers_reads_it(made: Path, tmp_path: Path) -> None:
    """With the text encoder, prior preservation and checkpointing; the real peft draws the same images from its file."""
    out = tmp_path / "run"
    more = ["--steps", 30, "--sample-every", 15, "--train-text-encoder", "--class-prompt", "a photo of a dog",
            "--class-images", 3, "--gradient-checkpointing"]  # fmt: skip
    said = booth(made, out, *more)
    assert "5 images of the subject, 3 of its class" in said
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 30 and report["loss_after"] < 0.97 * report["loss_before"]
    drawn = sorted(p.name for p in (out / "samples").glob("*.png"))
    assert drawn == [f"{step:06}-{i}.png" for step in (0, 15, 30) for i in (0, 1)]
    assert len(list((out / "class").glob("*.png"))) == 3
    for name in ("loss.png", "samples.png", "report.md"):
        assert (out / name).stat().st_size
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, numpy as np
from PIL import Image
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(made / "model")!r}, safety_checker=None)
pipe.load_lora_weights({str(out)!r})
assert pipe.get_list_adapters().keys() == {{"unet", "text_encoder"}}
draw = lambda: pipe("a photo of sks dog", num_inference_steps=2, guidance_scale=7.5, height=32, width=32,
                    generator=torch.Generator().manual_seed(0)).images[0]
found = np.asarray(draw()).astype(int)
pipe.disable_lora()
print(abs(found - np.asarray(Image.open({str(out / "samples" / "000030-0.png")!r})).astype(int)).max(),
      abs(np.asarray(draw()).astype(int) - np.asarray(Image.open({str(out / "samples" / "000000-0.png")!r}))).max(),
      abs(found - np.asarray(draw())).max())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    after, before, between = map(int, done.stdout.split()[-3:])
    assert after <= 1 and before <= 1 and between > 3  # of 255


def contents(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def test_a_stopped_run_goes_on(made: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--steps", 6, "--samples", 0, "--save-every", 3]
    for out in (whole, cut):
        booth(made, out, *more)
    (cut / "pytorch_lora_weights.safetensors").unlink()
    loss = json.loads((cut / "report.json").read_text())["loss_before"]
    (cut / "before.json").write_text(json.dumps({"loss": loss}))
    for path in (cut / "checkpoints" / "checkpoint-6").iterdir():
        if path.is_file():
            path.unlink()
    assert "resuming from" in booth(made, cut, *more, "--resume")
    # Not byte by byte: the header's two entries of metadata are written in any order.
    (first, said), (second, says) = (contents(out / "pytorch_lora_weights.safetensors") for out in (whole, cut))
    assert said == says and first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert "rank is 8 now and was 4" in booth(made, cut, *more, "--resume", "--rank", 8, fails=True)
    assert "--overwrite" in booth(made, cut, *more, fails=True)


def test_bad_input_is_one_line_and_loses_nothing(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes((made / "subject" / "0.png").read_bytes()[:60])
    for more, says in (
        (["--instance-data", empty], "no images in it"),
        (["--instance-data", tmp_path / "nowhere"], "no such folder"),
        (["--instance-data", broken], "a.png: cannot be read as an image"),
        (["--model", "nothing"], "no such folder, and no hub id"),
        (["--model", empty], "cannot be loaded"),
        (["--resolution", 30], "multiple of 8"),
        (["--class-data", empty], "--class-prompt"),
        (["--resume"], "no checkpoint"),
    ):
        assert says in booth(made, out, *more, fails=True), more
        assert not (out / "run.json").exists()


def test_images_of_all_modes(made: Path) -> None:
    for path in images.list_images(made / "subject"):
        image = images.read_image(path)
        assert image.mode == "RGB"
        low, high = image.convert("L").getextrema()
        assert high - low > 100, path
        t = images.to_tensor(image, 32, (0.0, 1.0))
        assert t.shape == (3, 32, 32) and -1 <= float(t.min()) < float(t.max()) <= 1
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    clear.save(made / "clear.png")
    assert images.read_image(made / "clear.png").getpixel((4, 4)) == (255, 255, 255)
    with pytest.raises(InputError, match="cannot be read"):
        images.read_image(Path(__file__))


@pytest.mark.parametrize(("checkpointing", "published"), [(False, 15.5), (True, 8.12)])
def test_memory_of_stable_diffusion(checkpointing: bool, published: float) -> None:
    """What peft's README says of SD 1.4 on an A100, when attention still formed its scores."""
    run = DreamBooth(
        model="CompVis/stable-diffusion-v1-4", instance_data="x", instance_prompt="a photo of sks dog",
        class_prompt="a photo of a dog", train_text_encoder=True, attention="eager",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    peak, trained = plan_run(run)
    assert peak.device / 1e9 == pytest.approx(published, rel=0.05)
    assert trained == 4_368_384
    now, _ = plan_run(DreamBooth(**{**vars(run), "attention": "sdpa"}))
    assert now.card < 11e9


def test_the_loss_weighs_subject_and_class(made: Path) -> None:
    from veneer.recipes.dreambooth.denoiser import Denoiser
    from veneer.recipes.dreambooth.train import load_pipeline, noise_of

    run = DreamBooth(model=str(made / "model"), instance_data="x", instance_prompt="y")
    pipe = load_pipeline(run)
    pixels, ids = torch.rand(4, 3, 32, 32) * 2 - 1, torch.ones(4, 16, dtype=torch.long)

    def loss(weight: float) -> float:
        torch.manual_seed(0)
        model = Denoiser(pipe.unet, pipe.text_encoder, pipe.vae, noise_of(pipe), weight, False)
        return float(model(pixels, ids, prior=True)["loss"])

    own, both, twice = loss(0.0), loss(1.0), loss(2.0)
    assert own > 0 and both > own
    assert twice - both == pytest.approx(both - own, rel=1e-4)
