"""Pictures of the page for docs/: `python tests/screenshots.py docs/images`, or `make screenshots`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from PIL import Image

import diffusion
from browser import browser, serving
from words import PAIRS, write_models

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 960}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 960}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}


def keep(page: Any, target: Path) -> None:
    """A picture of the whole page, in few colours."""
    page.screenshot(path=target, full_page=True)
    with Image.open(target) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def ended(page: Any, selector: str, name: str) -> None:
    page.wait_for_function(
        "([s, n]) => document.querySelector(s).innerText.includes(n + ' is finished')",
        arg=[selector, name],
        timeout=180_000,
    )
    page.wait_for_timeout(1800)


def pictures(out: Path, folder: Path, how: str) -> None:
    """The tabs in one look; the first of all trains what the others show."""
    with serving(folder / how, folder / "models") as url, browser() as chromium:
        page = chromium.new_context(**LOOKS[how]).new_page()
        page.goto(url)
        page.wait_for_selector("#start")
        page.get_by_label("Model", exact=True).first.fill("smollm2-135m")
        page.keyboard.press("Enter")
        page.get_by_label("Name of the run").first.fill("spanish")
        page.get_by_label("Steps", exact=True).first.fill("30")
        page.get_by_text("Further settings").first.click()
        page.get_by_label("one `name: value` a line").fill("limit: 240\nheld_out: 24\neval_every: 10\nmax_length: 48")
        page.locator("#start").click()
        page.wait_for_function("() => document.querySelector('#state').innerText.includes('step 14')", timeout=300_000)
        keep(page, out / f"ui-training-{how}.png")
        ended(page, "#state", "spanish")
        keep(page, out / f"ui-trained-{how}.png")
        page.get_by_role("tab", name="Try").click()
        page.locator("#try-adapters input").click()
        page.get_by_role("option", name="spanish").click()
        page.keyboard.press("Escape")
        page.locator("#prompt textarea").fill("English: Delete the selected files\nSpanish:")
        page.locator("#ask").click()
        page.locator(".answer textarea").nth(1).wait_for(timeout=120_000)
        page.wait_for_timeout(500)
        keep(page, out / f"ui-try-{how}.png")
        page.get_by_role("tab", name="Adapters").click()
        page.locator("#chosen input").click()
        page.get_by_role("option", name="spanish").click()
        page.get_by_text("Download as a zip").wait_for()
        keep(page, out / f"ui-adapters-{how}.png")
        if how == "phone":
            page.get_by_label("more").or_(page.get_by_text("…")).or_(
                page.locator(".overflow-menu > button")
            ).first.click()
            page.get_by_text("DreamBooth").last.click()
        else:
            page.get_by_role("tab", name="DreamBooth").click()
        page.get_by_label("Model", exact=True).last.fill("tiny-sd")
        page.keyboard.press("Enter")
        page.locator("#booth-prompt textarea, #booth-prompt input").first.fill("a photo of sks dog")
        page.locator("#pictures input[type=file]").set_input_files(sorted(map(str, (folder / "pictures").iterdir())))
        page.get_by_text("0.png").first.wait_for()
        for label, value in (("Steps", "40"), ("Resolution", "32"), ("Rank", "4")):
            page.get_by_label(label, exact=True).last.fill(value)
        page.locator("#booth-start").click()
        ended(page, "#booth-state", "my-subject")
        keep(page, out / f"ui-dreambooth-{how}.png")


def main(out: Path, wanted: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_models(folder / "models")
        (folder / "parts").mkdir()
        diffusion.pipeline(folder / "parts").save_pretrained(folder / "models" / "tiny-sd")
        diffusion.images(folder / "pictures")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
        for how in wanted or LOOKS:
            pictures(out, folder, how)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
