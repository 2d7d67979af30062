"""The commands on tables, which need no extra: `verify`, `repair`, `snapshot`, `delta`, `follow` and `inspect`."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

import hashemb
from hashemb.cli.console import confirm, counting, print_line
from hashemb.cli.following import follow_deltas

__all__ = ["add_commands"]

_TABLE = "directory of the table or model"


def add_commands(commands: Any) -> None:
    """Add the commands to `commands`, the subparsers of the main parser; each sets `run` to its function."""
    command = _add(commands, "inspect", _inspect, "Show a table's geometry, optimiser, size and model.")
    command.add_argument("table", type=Path, metavar="TABLE", help=_TABLE)
    command.add_argument("--exact", action="store_true", help="count touched rows by reading them")

    command = _add(
        commands, "verify", _verify,
        "Check all checksums and invariants of a table, snapshot or delta. The exit status is 1 if any check fails.",
    )  # fmt: skip
    command.add_argument("path", type=Path, metavar="PATH", help="directory of a table, model or snapshot, or a delta")
    command.add_argument("--suspects", action="store_true", help="name rows that killed processes were writing")

    command = _add(
        commands, "repair", _repair,
        "Replace a damaged table with a snapshot. The damaged table is kept; an intact table is not changed.",
    )  # fmt: skip
    command.add_argument("table", type=Path, metavar="TABLE", help=_TABLE)
    command.add_argument("--from", dest="snapshot", type=Path, required=True, metavar="SRC", help="a snapshot of it")
    command.add_argument("--yes", "-y", action="store_true", help="do not ask")

    command = _add(commands, "snapshot", _snapshot, "Copy a table at one point in time, while training continues.")
    command.add_argument("table", type=Path, metavar="TABLE", help=_TABLE)
    command.add_argument("target", type=Path, metavar="DST", help="directory to create")

    command = _add(
        commands, "delta", _delta,
        "Write the changes in a table since a snapshot or delta to one file, while training continues.",
    )  # fmt: skip
    command.add_argument("table", type=Path, metavar="TABLE", help=_TABLE)
    command.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="file to create, *.delta")
    command.add_argument("--since", type=Path, metavar="PATH", help="snapshot or delta to start from (default: none)")
    command.add_argument("--state", action="store_true", help="include the optimiser state, to continue training")
    dtypes = ("float32", "float16", "bfloat16")
    command.add_argument("--dtype", choices=dtypes, help="dtype of the weights (default: the table's)")

    command = _add(commands, "follow", _follow, "Keep a replica up to date with a directory of deltas, until Ctrl-C.")
    command.add_argument("deltas", type=Path, metavar="DELTAS", help="directory in which *.delta files arrive")
    command.add_argument("table", type=Path, metavar="TABLE", help="the replica; created if it does not exist")
    command.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help="seconds between polls")
    command.add_argument("--once", action="store_true", help="apply the deltas that have arrived, then exit")


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.01 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds of at least 0.01")
    return value


def _inspect(options: argparse.Namespace) -> int:
    from hashemb.ctr.report import describe

    for name, value in describe(options.table, exact=options.exact):
        print_line(f"{name:<16} {value}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    problems = _problems(options.path, suspects=options.suspects)
    if not problems:
        print_line(f"{options.path}: nothing is wrong")
    return 1 if problems else 0


def _problems(path: Path, *, suspects: bool = False) -> list[hashemb.Problem]:
    with counting("verifying") as progress:
        problems = hashemb.verify(path, progress=progress, suspects=suspects)
    for problem in problems:
        print_line(str(problem))
    return problems


def _repair(options: argparse.Namespace) -> int:
    from hashemb.ctr.report import steps_lost

    table, snapshot = options.table, options.snapshot
    if not _problems(table):
        print_line(f"{table}: nothing is wrong, nothing to repair")
        return 0
    lost = steps_lost(table, snapshot)
    if not options.yes and not confirm(f"Put {snapshot} in the place of {table}? {lost}"):
        raise KeyboardInterrupt
    with counting("restoring") as progress:
        aside = hashemb.restore(snapshot, table, replace=True, progress=progress)
    print_line(f"{table} is restored. {lost}")
    print_line(f"The damaged table: {aside}")
    return 0


def _snapshot(options: argparse.Namespace) -> int:
    with hashemb.open(options.table, "r+") as opened:
        info = opened.snapshot(options.target)
    print_line(f"snapshot number {info.sequence}, step {info.step:,}: {info.num_blocks:,} blocks in {options.target}")
    return 0


def _delta(options: argparse.Namespace) -> int:
    with hashemb.open(options.table, "r+") as opened:
        info = opened.export_delta(options.since, options.output, state=options.state, dtype=options.dtype)
    print_line(f"delta number {info.sequence}, step {info.step:,}: {info.num_blocks:,} blocks in {options.output}")
    return 0


def _follow(options: argparse.Namespace) -> int:
    with suppress(KeyboardInterrupt):
        follow_deltas(options.deltas, options.table, interval_s=options.interval, once=options.once)
    return 0
