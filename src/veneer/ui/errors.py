"""What a user did that cannot be done, as one line in the page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
import gradio as gr


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the complaints of `function` about its input; nothing in the page changes then."""

    @functools.wraps(function)
    def run(*args: object) -> Any:
        try:
            return function(*args)
        except click.ClickException as error:
            message = error.format_message()
        except (ValueError, TypeError, OSError, ImportError) as error:
            message = str(error)
        raise gr.Error(" ".join(message.split()), duration=20, print_exception=False, title="Not possible")

    return run
