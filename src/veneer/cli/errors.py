"""How a command says that its input is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


class InputError(click.ClickException):
    """Input that cannot be used: one message, exit status 2, no traceback."""

    exit_code = 2


class PointlessError(click.ClickException):
    """Training that would lead nowhere, as the watchdog found: one message, exit status 1, no traceback."""


@contextmanager
def user_input() -> Iterator[None]:
    """Turn the library's own complaints about values, files and missing packages into an `InputError`."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise InputError(str(error)) from error
