"""The Try tab: what a model says with and without adapters."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..files.embedded import EMBEDDED
from .errors import show_errors
from .folder import LORA, Folder
from .talk import Talk


class Trying:
    """The tab; `refresh` brings its list of adapters up to date."""

    def __init__(self, folder: Folder, talk: Talk) -> None:
        self.folder, self.talk = folder, talk
        models = [*folder.plain_models(), *EMBEDDED]
        with gr.Row():
            self.adapters = gr.Dropdown(
                [],
                value=[],
                multiselect=True,
                label="Adapters",
                info="each answers on its own",
                elem_id="try-adapters",
                scale=3,
            )
            self.model = gr.Dropdown(
                models, value=models[0], label="Model", allow_custom_value=True, info="follows the adapter", scale=2
            )
        prompt = gr.Textbox(label="Prompt", lines=4, placeholder="English: Save\nSpanish:", elem_id="prompt")
        with gr.Row():
            tokens = gr.Slider(1, 512, 48, step=1, label="New tokens at most")
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token")
            chat = gr.Checkbox(False, label="Chat template")
        ask = gr.Button("Answer", variant="primary", elem_id="ask")
        answers = gr.State([])

        @gr.render(inputs=answers)  # type: ignore[untyped-decorator]
        def show(found: list[tuple[str, str]]) -> None:
            with gr.Row():
                for who, text in found:
                    gr.Textbox(
                        text,
                        label=who,
                        lines=5,
                        interactive=False,
                        min_width=260,
                        elem_classes="answer",
                        buttons=["copy"],
                    )

        self.adapters.change(self.follow, self.adapters, self.model, show_progress="hidden")
        inputs = [self.model, self.adapters, prompt, tokens, temperature, chat]
        gr.on([ask.click], show_errors(self.answer), inputs, answers)

    def choices(self) -> list[str]:
        """Adapters of transformers' models; those of diffusers draw."""
        return [n for n in self.folder.adapters() if not (self.folder.inside(n) / LORA).is_file()]

    def refresh(self) -> Any:
        return gr.Dropdown(choices=self.choices())

    def follow(self, runs: list[str]) -> Any:
        """The base model that the chosen adapter names."""
        base = self.talk.base_of(runs[0]) if runs else ""
        return gr.Dropdown(value=base) if base else gr.skip()

    def answer(self, model: str, runs: list[str], prompt: str, tokens: int, temperature: float, chat: bool) -> Any:
        found, warnings = self.talk.answer(model, runs, prompt, tokens, temperature, chat)
        for warning in dict.fromkeys(warnings):
            gr.Warning(warning)
        return found
