"""The `hashemb` command: runs it, and turns errors into one line and an exit status.

Exit status: 0 success, 1 bad table or input file, 2 usage error, 130 stopped by Ctrl-C.
Importing this module needs no extra, so that a missing one can be reported as such.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any, NoReturn

import hashemb
from hashemb.cli.console import print_line
from hashemb.cli.tables import add_commands
from hashemb.errors import HashembError

__all__ = ["main"]

#: The commands of `hashemb.cli.models` and `hashemb.cli.report`, which are loaded when one of them is used.
MODEL_COMMANDS = {
    "train": "Train a model on files, printing the progressive validation loss.",
    "predict": "Print the probability of each example.",
    "report": "Write a page about a model.",
    "demo": "Generate a click log, train on it, and compare the model with the true probabilities.",
}


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
            return _run(sys.argv[1:] if arguments is None else arguments)
    except UsageError as error:
        return _fail(str(error), 2)
    except (HashembError, OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        return _fail(_describe(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


class UsageError(Exception):
    """The command line is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.replace("the following arguments are required:", "Missing argument")
        raise UsageError(f"{message} (see {self.prog} --help)")


def _run(arguments: list[str]) -> int:
    """Run one command. Those on models parse their own options with typer, which only the extra ctr installs."""
    if arguments and arguments[0] in MODEL_COMMANDS:
        return _run_model_command(arguments)
    parser = _Parser(prog="hashemb", description="Embedding tables as files, and models on them.")
    parser.add_argument("--version", action="version", version=f"hashemb {hashemb.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    add_commands(commands)
    for name, text in MODEL_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (extra: ctr)", add_help=False)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        raise UsageError(f"No such command {arguments[0]!r} (see hashemb --help)")
    try:
        options = parser.parse_args(arguments or ["--help"])
    except SystemExit:  # --help and --version have printed their text
        return 0
    status: int = options.run(options)
    return status


def _run_model_command(arguments: list[str]) -> int:
    from hashemb.cli import report  # noqa: F401 - registers its command
    from hashemb.cli.models import app, typer

    usage_error: Any = typer.BadParameter.__bases__[0]  # from click or typer's copy of it, by version
    try:
        command = typer.main.get_command(app)
        status: Any = command.main(args=arguments, prog_name="hashemb", standalone_mode=False)
    except usage_error as error:
        raise UsageError(f"{error.format_message()}{_hint(error)}") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
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
