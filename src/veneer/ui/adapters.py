"""The Adapters tab: what is there, what is in it, and zips in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..recipes.describe_adapter import describe_adapter
from .errors import show_errors
from .folder import LORA, Folder


class Adapters:
    """The tab; `refresh` brings its list up to date."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        with gr.Row():
            with gr.Column(scale=3):
                self.chosen = gr.Dropdown([], label="Adapter", elem_id="chosen")
                details = gr.Markdown("Choose an adapter to see what is in it.", elem_id="details")
                download = gr.DownloadButton("Download as a zip", visible=False, elem_id="download-chosen")
            with gr.Column(scale=2):
                upload = gr.File(label="A zip of an adapter's folder", file_types=[".zip"], height=130, elem_id="zip")
                name = gr.Textbox(label="Name it gets", placeholder="the zip's")
                add = gr.Button("Add")
        self.chosen.change(show_errors(self.look), self.chosen, [details, download], show_progress="hidden")
        add.click(show_errors(self.add), [upload, name], [self.chosen, upload, name])

    def refresh(self) -> Any:
        return gr.Dropdown(choices=self.folder.adapters())

    def look(self, name: str | None) -> Any:
        if not name:
            return "Choose an adapter to see what is in it.", gr.DownloadButton(visible=False)
        folder = self.folder.inside(name)
        if (folder / LORA).is_file():
            size = (folder / LORA).stat().st_size
            rows = [
                ("kind", "LoRA of a Stable Diffusion model, for diffusers' load_lora_weights"),
                ("file", f"{size / 1e6:.2f} MB"),
            ]
        else:
            rows = [r for r in describe_adapter(str(folder)) if r[0] != "file"]
        table = "\n".join(["| | |", "|---|---|", *(f"| {a} | {escape_markdown(b)} |" for a, b in rows)])
        return table, gr.DownloadButton(value=str(self.folder.zipped(name)), visible=True)

    def add(self, upload: str | None, name: str) -> Any:
        if not upload:
            raise ValueError("choose a zip first")
        name = (name or Path(upload).stem).strip()
        self.folder.unzip(upload, name)
        gr.Info(f"{name} was added")
        return gr.Dropdown(choices=self.folder.adapters(), value=name), None, ""


def escape_markdown(text: str) -> str:
    """Text of a file, as nothing but text in Markdown."""
    for character in "\\`*_{}[]()#+!|~":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
