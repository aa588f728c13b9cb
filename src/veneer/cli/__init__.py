"""The command line: one file a command, its flags in app; may import ui, recipes and everything below them."""

from __future__ import annotations

from ..interop.console import quiet_libraries


def main() -> None:
    """Entry point of the `veneer` command."""
    quiet_libraries()
    try:
        from .app import app
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"veneer: the command line needs {error.name}; install it with: pip install 'veneer[train]'"
        ) from None
    app(prog_name="veneer")
