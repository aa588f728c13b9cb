"""How a command says that its input is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


class InputError(click.ClickException):
    """Input that cannot be used: one message, exit status 2, no traceback."""

    exit_code = 2


class PointlessError(click.ClickException):
    """Training that would lead nowhere, as the watchdog found: one message, exit status 1, no traceback."""


class DiskError(click.ClickException):
    """What cannot be read or written while a run goes on: one message, exit status 1, no traceback."""


@contextmanager
def report_disk_errors(resume: Callable[[], bool]) -> Iterator[None]:
    """Turn an error of the operating system into a `DiskError` that says whether the run can be resumed."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename or error.strerror):
            raise
        what = error.strerror or ""
        where = f": {error.filename}" if error.filename and str(error.filename) not in what else ""
        then = "; make room and go on with --resume" if resume() else ""
        raise DiskError(f"{what}{where}{then}") from error


@contextmanager
def user_input() -> Iterator[None]:
    """Turn the library's own complaints about values, files and missing packages into an `InputError`."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise InputError(str(error)) from error
