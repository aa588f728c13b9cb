"""The page and the server behind it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from ..recipes.errors import InputError
from .folder import Folder

LOCAL = ("127.0.0.1", "localhost", "::1")
UPLOAD = 1 << 30  # bytes of an upload


def set_environment(folder: Folder) -> None:
    """What gradio reads when it is imported: no telemetry, and its copies of files below our folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder.hidden / "cache")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def build_page(folder: Folder) -> Any:
    """The page as gradio Blocks."""
    set_environment(folder)
    import gradio as gr

    from .adapters import Adapters
    from .booth import Booth
    from .runner import Runner
    from .talk import Talk
    from .training import Training
    from .trying import Trying

    runner = Runner(folder)
    with gr.Blocks(title="Veneer", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(
            f"# Veneer\nTrain a thin layer on a frozen model. Runs are in `{folder.root}`.",
            elem_id="title",
            padding=False,
        )
        with gr.Tabs():
            with gr.Tab("Train"):
                Training(folder, runner)
            with gr.Tab("Try") as tab_try:
                trying = Trying(folder, Talk(folder))
            with gr.Tab("Adapters") as tab_adapters:
                adapters = Adapters(folder)
            with gr.Tab("DreamBooth"):
                Booth(folder, runner)
        for event in (tab_try.select, blocks.load):
            event(trying.refresh, None, trying.adapters, show_progress="hidden")
        for event in (tab_adapters.select, blocks.load):
            event(adapters.refresh, None, adapters.chosen, show_progress="hidden")
    blocks.runner = runner
    return blocks


def build_application(folder: Folder, host: str) -> Any:
    """The page as an ASGI application, which answers to its own names only."""
    blocks = build_page(folder)
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from . import look

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOCAL:  # another site's name that was made to point here is refused (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    app.state.runner = blocks.runner
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        allowed_paths=[str(folder.hidden / "zips")],
        blocked_paths=[str(folder.hidden / "uploads"), str(folder.hidden / "logs")],
        max_file_size=UPLOAD,
        show_error=True,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        theme=look.make_theme(),
        css=look.CSS,
    )


def serve_page(root: Path, models: Path | None, host: str, port: int) -> None:
    """Serve the page until it is interrupted; a run that goes on then is stopped.

    Raises:
        InputError: gradio is missing, the port is taken, or a folder cannot be used.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise InputError("the page needs gradio; install: pip install 'veneer[ui]'") from error
    import click

    folder = Folder(root, models)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another port") from error
    app = build_application(folder, host)
    if host not in LOCAL:
        click.echo(
            f"warning: whoever reaches {host}:{port} can train on this machine and read the runs; there is no password",
            err=True,
        )
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"the page is at http://{shown}:{port}  (Ctrl+C ends it)")
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)
    finally:
        if app.state.runner.busy:
            app.state.runner.stop()
