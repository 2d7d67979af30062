"""The `hashemb` command: runs it, and turns errors into one line and an exit status.

Exit status: 0 success, 1 bad table or input file, 2 usage error, 130 stopped by Ctrl-C.
Importing this module needs no extra, so that a missing one can be reported as such.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from hashemb.ctr._printable import print_line
from hashemb.errors import HashembError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Command-line arguments. Default ``sys.argv[1:]``.

    Returns
    -------
    int
        Exit status.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(arguments)
    except (HashembError, OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        return _fail(_describe(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _run(arguments: list[str] | None) -> int:
    from hashemb.ctr import report_commands  # noqa: F401 - registers its command
    from hashemb.ctr.commands import app, typer

    usage_error: Any = typer.BadParameter.__bases__[0]  # from click or typer's copy of it, by version
    command = typer.main.get_command(app)
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        status: Any = command.main(args=arguments or ["--help"], prog_name="hashemb", standalone_mode=False)
    except usage_error as error:
        return _fail(f"{error.format_message()}{_hint(error)}", 2)
    except typer.Abort:
        return _fail("stopped", 130)
    return status if isinstance(status, int) else 0


def _hint(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        name = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
        return f"{name}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, status: int) -> int:
    print_line(f"hashemb: {message}", stderr=True)
    return status


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print_line(f"hashemb: warning: {message}", stderr=True)


if __name__ == "__main__":
    sys.exit(main())
