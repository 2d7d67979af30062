"""`hashemb follow`: poll a directory of deltas, apply new ones, and report them."""

from __future__ import annotations

import os
import time

import hashemb
from hashemb.cli.console import print_line

__all__ = ["follow_deltas"]


def follow_deltas(
    directory: str | os.PathLike[str], table: str | os.PathLike[str], *, interval_s: float = 1.0, once: bool = False
) -> None:
    """Apply deltas as they arrive, printing a line for each, and a line when the reason for a delay changes.

    Parameters
    ----------
    directory, table : path
        As for `hashemb.follow`.
    interval_s : float
        Seconds between polls.
    once : bool
        Return after the first poll.
    """
    trouble: list[str] = []
    while True:
        status = hashemb.follow(table, directory, on_applied=_say_applied)
        if status.applied or once:
            print_line(_summary(status))
        if _troubles(status) != trouble:
            trouble = _troubles(status)
            for line in trouble:
                print_line(line)
        if once:
            return
        time.sleep(interval_s)


def _say_applied(info: hashemb.DeltaInfo) -> None:
    age_s = max(0.0, time.time() - info.created)
    print_line(f"applied number {info.sequence}: step {info.step:,}, {info.num_blocks:,} blocks, {age_s:.1f} s old")


def _summary(status: hashemb.FollowStatus) -> str:
    if status.sequence is None:
        return f"no replica yet, {status.pending} pending, lag {status.lag_s:.1f} s"
    return f"at number {status.sequence}, step {status.step:,}: {status.pending} pending, lag {status.lag_s:.1f} s"


def _troubles(status: hashemb.FollowStatus) -> list[str]:
    gap = [f"number {status.gap} is missing"] if status.gap is not None else []
    return gap + [f"skipped {name}: {why}" for name, why in status.skipped.items()]
