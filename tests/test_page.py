"""The page of `veneer ui`: what it lets in, and a full training clicked through in Chromium."""

from __future__ import annotations

import io
import json
import shutil
import stat
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import veneer
from browser import CHROMIUM, browser, serving
from small import llama, lora
from veneer.cli.app import app
from veneer.recipes.errors import InputError
from words import PAIRS, write_models

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'veneer[ui]'")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from veneer.ui import folder as folders  # noqa: E402
from veneer.ui.folder import Folder  # noqa: E402
from veneer.ui.runner import Runner  # noqa: E402
from veneer.ui.training import arguments_of, flags_of, list_methods, method_fields  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    return Folder(tmp_path / "runs", tmp_path / "models")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\\b", "-x", "a" * 65, "a\0b", "ä"])
def test_names_that_are_no_plain_names(folder: Folder, name: str) -> None:
    with pytest.raises(InputError):
        folder.inside(name)


def test_a_link_leads_nowhere(folder: Folder, tmp_path: Path) -> None:
    (folder.root / "out").symlink_to(tmp_path)
    lora().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="leads out"):
        folder.inside("out")
    assert folder.adapters() == []


@pytest.mark.parametrize("name", ["", "/etc", "../models/tiny", "~/x", "./x", "a/b/c", "--help", "a\\b"])
def test_models_and_data_are_no_paths(folder: Folder, name: str) -> None:
    with pytest.raises(InputError):
        folder.model(name)
    with pytest.raises(InputError):
        folder.dataset(name if name != "a/b/c" else "/a/b/c", None)


def test_models_go_by_name(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.plain_models() == ["tiny"] and folder.model("tiny") == str(tmp_path / "models" / "tiny")
    assert folder.model("owner/name") == "owner/name" and folder.model("smollm2-135m") == "smollm2-135m"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is a folder here"):
        folder.model("owner/name")


def packed(target: Path, members: dict[str, bytes], mode: int = 0o644) -> Path:
    with zipfile.ZipFile(target, "w") as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, data)
    return target


def files_of(source: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in source.iterdir() if f.is_file()}


def test_an_adapter_goes_out_and_comes_back(folder: Folder, tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(folder.root / "mine")
    assert folder.adapters() == ["mine"]
    zipped = folder.zipped("mine")
    folder.unzip(str(zipped), "again")
    assert veneer.PeftModel.from_pretrained(llama(), folder.root / "again").peft_type == "LORA"
    with pytest.raises(InputError, match="exists"):
        folder.unzip(str(zipped), "again")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"../../escape.json": b"{}"}, "leads out"),
        ({"/abs.json": b"{}"}, "leads out"),
        ({"a\\b.json": b"{}"}, "leads out"),
        ({"run.py": b"print()"}, "an adapter's files end with"),
        ({".bashrc.txt": b""}, "an adapter's files end with"),
        ({f"{i}.txt": b"" for i in range(80)}, "files; 64 are allowed"),
        ({"b/adapter_config.json": b"{}"}, "several folders"),
        ({"adapter_config.json": b"{"}, "no valid JSON"),
        ({"adapter_model.safetensors": b"xx"}, "damaged"),
    ],
)
def test_zips_that_are_refused(folder: Folder, tmp_path: Path, change: dict[str, bytes], text: str) -> None:
    lora().save_pretrained(tmp_path / "a")
    upload = packed(tmp_path / "x.zip", files_of(tmp_path / "a") | change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=text):
        folder.unzip(str(upload), "new")
    after = [p for p in sorted(tmp_path.rglob("*")) if folders.HIDDEN not in p.parts]
    assert after == [p for p in before if folders.HIDDEN not in p.parts]


def test_links_and_lies_in_zips(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = packed(tmp_path / "l.zip", {"adapter_config.json": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    with pytest.raises(InputError, match="a link"):
        folder.unzip(str(link), "new")
    (tmp_path / "no.zip").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="no zip"):
        folder.unzip(str(tmp_path / "no.zip"), "new")
    monkeypatch.setattr(folders, "UNPACKED", 10)
    with pytest.raises(InputError, match="10 are allowed"):
        folder.unzip(str(packed(tmp_path / "b.zip", {"a.txt": b"x" * 11})), "new")
    with pytest.raises(InputError, match="larger than the zip says"):
        folders.copy_member(io.BytesIO(b"x" * 20), io.BytesIO(), 10, "a")


def test_the_form_is_the_command(tmp_path: Path) -> None:
    values = {"model": "m", "data": "d", "task": "causal-lm", "method": "lora", "steps": 10, "learning_rate": ""}
    own = ["4", "[q_proj, v_proj]", "", ""]
    flags = flags_of(values, own, "use_dora: true\ngradient_accumulation: 2\nliger: false")
    words = arguments_of(flags)
    assert words[words.index("--r") + 1] == "4" and "--use-dora" in words and "--no-liger" in words
    result = CliRunner().invoke(app, ["train", *words, "--out", str(tmp_path / "x"), "--batch-size", "0"])
    assert result.exit_code == 2 and "batch_size=0: must be 1 or more" in result.output  # all other flags were accepted


@pytest.mark.parametrize("text", ["- a", "a: b: c", "out: /tmp/x", "eval_data: /etc/passwd"])
def test_further_settings_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="further settings"):
        flags_of({"method": "lora"}, [], text)


def test_every_method_has_its_fields() -> None:
    for name in list_methods():
        assert all(len(f) == 3 for f in method_fields(name.lower()))


def test_one_run_at_a_time_and_its_complaint(folder: Folder) -> None:
    runner = Runner(folder)
    job = runner.start("train", "bad", ["train", "--model", "nothing-there", "--data", "x"], 0)
    with pytest.raises(InputError, match="'bad' is being trained"):
        runner.start("train", "other", ["--help"], 0)
    wait(job)
    assert job.state == "failed" and job.complaint().startswith(("model 'nothing-there'", "data 'x'"))
    job = runner.start("train", "long", ["plan", "t0_3b", "--length", "64"], 0)
    runner.stop()
    wait(job)
    assert job.state == "stopped" and not runner.busy


def wait(job: Any) -> None:
    for _ in range(600):
        if job.state != "running" and job.process.poll() is not None:
            return
        time.sleep(0.1)
    raise AssertionError(job.printed())


def test_the_command_complains_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["ui", "--folder", str(tmp_path / "file")])
    assert result.exit_code == 2 and "is a file; give a folder" in result.output
    result = CliRunner().invoke(app, ["ui", "--folder", str(tmp_path / "r"), "--models", str(tmp_path / "none")])
    assert result.exit_code == 2 and "there is no such folder" in result.output


def until(page: Any, selector: str, text: str, seconds: int = 60) -> str:
    for _ in range(seconds * 4):
        said: str = page.locator(selector).inner_text()
        if text in said:
            return said
        assert f"{text.split(maxsplit=1)[0]} failed" not in said or text.endswith("failed"), said
        page.wait_for_timeout(250)
    raise AssertionError(f"{text!r} did not come: {said}")


def give(page: Any, upload: Any, *paths: Path) -> None:
    """Upload files; again, if the page was not ready to take them."""
    for _ in range(5):
        if upload.count():  # gone once they are taken
            upload.set_input_files([str(p) for p in paths])
        for _ in range(20):
            if page.get_by_text(paths[-1].name).first.is_visible():
                return
            page.wait_for_timeout(500)
    raise AssertionError(f"{paths[-1].name} was not taken")


def clear(upload: Any, button: Any) -> None:
    """Take a file away; again, if the page was being drawn and lost the click."""
    from playwright.sync_api import TimeoutError as NotYet

    for _ in range(10):
        try:
            button.click(timeout=3000)
            upload.first.wait_for(state="attached", timeout=3000)
            return
        except NotYet:
            if upload.count():
                return
    raise AssertionError("the file cannot be taken away")


def train(page: Any, name: str, steps: int, rate: str, state: str = "is finished") -> str:
    page.get_by_label("Name of the run").first.fill(name)
    page.get_by_label("Steps", exact=True).first.fill(str(steps))
    page.get_by_label("Learning rate").first.fill(rate)
    page.locator("#start").click()
    return until(page, "#state", f"{name} {state}")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_training_clicked_through(tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    runs = tmp_path / "runs"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    (tmp_path / "wrong.jsonl").write_text('{"question": "a"}\n' * 20)
    with serving(runs, tmp_path / "models") as url, browser() as chromium:
        outside: list[str] = []
        page = chromium.new_context(viewport={"width": 390, "height": 844}, accept_downloads=True).new_page()
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
        page.goto(url)
        page.wait_for_selector("#start")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing is cut off on a phone
        page.get_by_label("Model", exact=True).first.fill("causal")
        page.keyboard.press("Enter")

        upload = page.locator("input[type=file]").first
        give(page, upload, tmp_path / "wrong.jsonl")
        said = train(page, "wrong", 5, "", "failed")
        assert "'question'" in said and "\n" not in said.strip()
        assert page.get_by_label("Steps", exact=True).first.input_value() == "5"  # nothing that was typed is lost

        clear(upload, page.get_by_label("Remove").or_(page.get_by_label("Clear")).first)
        give(page, upload, tmp_path / "pairs.jsonl")
        train(page, "first", 300, "2e-2")
        page.locator("#loss canvas, #loss svg").first.wait_for()
        until(page, "#figures", "held-out loss")
        report = json.loads((runs / "first" / "report.json").read_text())
        assert report["loss_after"] < report["loss_before"] and report["steps"] == 300
        with page.expect_download() as got:
            page.locator("#download").click()
        got.value.save_as(tmp_path / "first.zip")
        with zipfile.ZipFile(tmp_path / "first.zip") as file:
            file.extractall(tmp_path / "out")
        assert veneer.PeftConfig.from_pretrained(tmp_path / "out" / "first").peft_type == "LORA"

        page.reload()
        until(page, "#state", "first is finished")  # also for who comes back later
        page.get_by_label("Model", exact=True).first.fill("causal")
        page.keyboard.press("Enter")
        give(page, page.locator("input[type=file]").first, tmp_path / "pairs.jsonl")
        train(page, "second", 4, "1e-3")

        page.get_by_role("tab", name="Try").click()
        page.locator("#ask").click()
        page.get_by_text("the prompt is empty").wait_for()
        for name in ("first", "second"):
            page.locator("#try-adapters input").click()
            page.get_by_role("option", name=name).click()
        page.keyboard.press("Escape")
        page.locator("#prompt textarea").fill("say red 3")
        page.locator("#ask").click()
        answers = page.locator(".answer textarea")
        answers.nth(2).wait_for(timeout=60_000)
        base, first, second = (answers.nth(i).input_value() for i in range(3))
        assert first == "red red" and base != "red red" and second
        assert outside == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_other_names_and_files_are_not_served(tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    (tmp_path / "models").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    with serving(tmp_path / "runs", tmp_path / "models") as url:
        for path, host, code in [
            ("/", "evil.example", 400),
            (f"/gradio_api/file={tmp_path / 'secret.txt'}", None, 403),
            (
                f"/gradio_api/file={tmp_path / 'runs' / folders.HIDDEN / 'zips' / '..' / '..' / '..' / 'secret.txt'}",
                None,
                403,
            ),
            ("/gradio_api/file=/etc/passwd", None, 403),
            ("/docs", None, 404),
        ]:
            request = urllib.request.Request(url + path, headers={"Host": host} if host else {})
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=10)
            assert error.value.code == code, path


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_dreambooth_clicked_through(tmp_path: Path) -> None:
    import diffusion

    (tmp_path / "parts").mkdir()
    diffusion.pipeline(tmp_path / "parts").save_pretrained(tmp_path / "models" / "tiny-sd")
    pictures = sorted(diffusion.images(tmp_path / "pictures", 5).iterdir())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with serving(tmp_path / "runs", tmp_path / "models") as url, browser() as chromium:
        page = chromium.new_page()
        page.goto(url)
        page.get_by_role("tab", name="DreamBooth").click()
        page.locator("#booth-prompt textarea, #booth-prompt input").first.fill("a photo of sks dog")
        for label, value in (("Steps", "8"), ("Resolution", "32"), ("Rank", "4")):
            page.get_by_label(label, exact=True).last.fill(value)
        page.get_by_text("Further settings").last.click()
        page.get_by_label("Steps between samples").fill("4")
        page.get_by_label("Denoising steps").fill("2")
        upload = page.locator("#pictures input[type=file]")
        give(page, upload, pictures[0], tmp_path / "broken.png")
        page.locator("#booth-start").click()
        page.get_by_text("broken.png is no image that can be read").wait_for()
        clear(upload, page.get_by_label("Clear").last)
        give(page, upload, *pictures)
        page.locator("#booth-start").click()
        until(page, "#booth-state", "is finished", 120)
        page.locator("#samples img").first.wait_for()
        with page.expect_download() as got:
            page.locator("#booth-download").click()
        got.value.save_as(tmp_path / "booth.zip")
        assert "my-subject/pytorch_lora_weights.safetensors" in zipfile.ZipFile(tmp_path / "booth.zip").namelist()
    shutil.rmtree(tmp_path / "runs")
