"""A storm of signals: four processes work on one table, and signal handlers, which may run at any time, use it too.

    $ python tests/storm.py --signals 100000 --seed 0

Each process updates, looks up, takes snapshots and applies deltas to its own replica (storm_worker.py). Signals come
from a timer in the process and from os.kill outside; their handlers update, look up, take snapshots, export, flush,
close the table, set its learning rate, raise, or do nothing. The storm fails if

- a process makes no progress for longer than a generous limit: it is killed, and its stacks are shown;
- a call ends in anything but a result, `TableBusyError` in a handler, `ClosedTableError`, or a handler's exception;
- the gate or another lock of the table is held when all processes are idle, or a process does not end when told to;
- a snapshot, the table or a replica does not verify, or a replica differs from its source;
- the table has fewer steps than updates that returned, or more than those and the interrupted ones together;
- descriptors are still open when all tables are closed, whatever was raised.

It prints the outcomes of each kind of call, and how long updates were held up: their wall time less processor time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from storm_parts import FINISH, HANDLERS, IDLE, ROLES, SIZES, Board, create
from storm_worker import work

import hashemb
from hashemb import _sharing

PATIENCE_S = 20.0  # on a machine where the largest batch takes USUAL_BATCH_S; longer on slower ones
USUAL_BATCH_S = 0.02
MEAN_PAUSE_S = 0.002  # between two bursts of signals from outside, to any process
MOST_PER_CALL = 8  # signals: a call that is interrupted forever would be the only one tried
#: Byte ranges of the file `lock` that must be unlocked when all processes are idle.
PLACES = {
    "gate": _sharing.LOCK_GATE,
    "turnstile": _sharing.LOCK_GATE + 1,
    "snapshot": _sharing.LOCK_SNAPSHOT,
    "blocks and rows": 1 << 32,
}


class StormError(AssertionError):
    """Raised for a failure of the storm; the message contains the stacks or the errors."""


def run_storm(
    directory: Path, *, signals: int, seed: int = 0, workers: int = 4, handlers: Sequence[str] = tuple(HANDLERS)
) -> dict[str, Any]:
    """Run the storm in a new directory below `directory`, which is removed unless it fails; return the figures."""
    root = Path(tempfile.mkdtemp(prefix="storm-", dir=directory))
    storm = Storm(root, signals, seed, workers, list(handlers))
    try:
        figures = storm.run()
    finally:
        storm.kill()
    shutil.rmtree(root)
    return figures


class Storm:
    """The driver: it starts the processes, sends them signals, watches them, and checks what they leave."""

    def __init__(self, root: Path, signals: int, seed: int, num_workers: int, handlers: list[str]) -> None:
        self.root, self.wanted, self.seed, self.num_workers, self.handlers = root, signals, seed, num_workers, handlers
        self.random = random.Random(f"{seed} conductor")
        with create(root / "table") as table:
            self.patience_s = PATIENCE_S * max(1.0, largest_batch_s(table) / USUAL_BATCH_S)
            self.first_step = table.step
        self.board = Board(root / "board", num_workers)
        self.processes: list[Any] = []
        self.began = time.monotonic()

    def run(self) -> dict[str, Any]:
        context = multiprocessing.get_context("spawn")
        for number in range(self.num_workers):
            args = (self.root, number, self.seed, self.num_workers, self.handlers)
            self.processes.append(context.Process(target=work, args=args, daemon=True))
            self.processes[-1].start()
        self.until(lambda: bool((self.board["beats"] > 0).all()), "all processes to begin")
        self.send_signals()
        self.board.phase[0] = IDLE
        self.until(lambda: bool(self.board["is_idle"].all()), "all processes to stand idle")
        self.check_failures()
        self.check_locks()
        self.board.phase[0] = FINISH
        self.until(lambda: all(process.exitcode is not None for process in self.processes), "all processes to end")
        return self.judge()

    # -- signals and the watchdog --

    def send_signals(self) -> None:
        while self.board["signals"].sum() < self.wanted:
            time.sleep(self.random.expovariate(1 / MEAN_PAUSE_S))
            number = self.random.randrange(self.num_workers)
            if self.board["signals"][number] - self.board["signals_before"][number] < MOST_PER_CALL:
                for _ in range(self.random.choice([1, 1, 1, 4])):
                    os.kill(self.processes[number].pid, signal.SIGUSR1)
            self.check_failures()
            self.check_progress()

    def check_failures(self) -> None:
        """Raise the failures of processes: one with an unexpected error ends its loop and reports it."""
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            raise StormError(f"a process died: exit codes {codes}; see {self.root}")
        if self.board["has_failed"].any():
            self.board.phase[0] = FINISH
            end = time.monotonic() + self.patience_s
            while time.monotonic() < end and any(process.exitcode is None for process in self.processes):
                time.sleep(0.01)
            failures = [text for results in self.results() for text in results["failures"]]
            raise StormError("calls ended in errors that are not documented:\n" + "\n".join(failures))

    def check_progress(self) -> None:
        now = time.monotonic_ns()
        for number, last in enumerate(self.board["last_beat_ns"].tolist()):
            if last and not self.board["is_idle"][number] and now - last > self.patience_s * 1e9:
                role, signals = ROLES[number % len(ROLES)], self.board["signals"].sum()
                raise StormError(
                    f"process {number} ({role}) hangs: no progress for {self.patience_s:.0f} s, after {signals} signals"
                    f"\n{self.stacks()}"
                )

    def until(self, condition: Any, what: str) -> None:
        end = time.monotonic() + 3 * self.patience_s
        while not condition():
            if time.monotonic() > end:
                raise StormError(f"waited {3 * self.patience_s:.0f} s for {what}\n{self.stacks()}")
            self.check_progress()
            time.sleep(0.01)

    def stacks(self) -> str:
        """Return the stacks of every thread of every process, in Python and in the kernel."""
        shown = []
        for number, process in enumerate(self.processes):
            if process.exitcode is not None:
                continue
            os.kill(process.pid, signal.SIGUSR2)
            time.sleep(0.5)
            python = (self.root / f"stacks-{number}").read_text(encoding="utf-8")
            shown.append(f"-- process {number}, waiting in the kernel at {waiting_places(process.pid)}\n{python}")
        return "\n".join(shown)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    # -- judging --

    def check_locks(self) -> None:
        """Check the locks while all processes are idle with the table open: only the writers' lock may be held."""
        fd = os.open(self.root / "table" / "lock", os.O_RDWR)
        try:
            held = [name for name, place in PLACES.items() if is_held(fd, place, 0 if place >> 32 else 1)]
        finally:
            os.close(fd)
        if held:
            raise StormError(f"all processes stand idle, and somebody holds {', '.join(held)}")

    def results(self) -> list[dict[str, Any]]:
        files = [self.root / f"results-{number}.json" for number in range(self.num_workers)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]

    def judge(self) -> dict[str, Any]:
        results = self.results()
        self.check_failures()
        if len(results) != self.num_workers or any(process.exitcode for process in self.processes):
            raise StormError(f"exit codes {[process.exitcode for process in self.processes]}, {len(results)} results")
        counts: Counter[tuple[str, str, str]] = Counter()
        for result in results:
            for where, what, outcome, count in result["counts"]:
                counts[where, what, outcome] += count
        problems = hashemb.verify(self.root / "table")
        if problems:
            raise StormError(f"the table does not verify: {problems}")
        self.check_steps(counts)
        lost = [name for result in results for name in result["left_open"]]
        if lost:
            raised = counts["handler", "raise", "ok"]
            raise StormError(f"after {raised} exceptions these are open: {json.dumps(lost, indent=1)}")
        return self.figures(results, counts)

    def check_steps(self, counts: Counter[tuple[str, str, str]]) -> None:
        steps = hashemb.info(self.root / "table").step - self.first_step
        done = sum(count for (_, what, outcome), count in counts.items() if (what, outcome) == ("update", "ok"))
        cut = counts["loop", "update", "interrupted"]
        if not done <= steps <= done + cut:
            raise StormError(f"{done} updates returned and {cut} were interrupted, yet the table counts {steps} steps")

    def figures(self, results: list[dict[str, Any]], counts: Counter[tuple[str, str, str]]) -> dict[str, Any]:
        held, left = self.board.held.sum(axis=0), sorted(entry.name for entry in self.root.iterdir())
        outcomes = {" ".join(key[:2]) + f": {key[2]}": count for key, count in sorted(counts.items())}
        expected = ("table", "board", "stacks-", "results-", "replica-", "link.delta-", "last.delta-")
        return {
            "signals": sum(result["signals"] for result in results),
            "seconds": round(time.monotonic() - self.began, 1),
            "outcomes": outcomes,
            "updates timed": int(held.sum()),
            "held up, median, ms": round(quantile_ms(held, 0.5), 3),
            "held up, p99.9, ms": round(quantile_ms(held, 0.999), 3),
            "held up, longest, ms": round(float(self.board["longest_held_ns"].max()) / 1e6, 3),
            "left behind": [name for name in left if not name.startswith(expected)],
        }


def largest_batch_s(table: hashemb.EmbeddingTable) -> float:
    """Return the time of an update with the largest batch, the best of five without other load."""
    size, times = max(SIZES), []
    keys, grads = np.arange(size), np.zeros((size, table.embedding_dim), np.float32)
    for _ in range(5):
        began = time.perf_counter()
        table.update(keys, grads)
        times.append(time.perf_counter() - began)
    return min(times)


def is_held(fd: int, place: int, length: int) -> bool:
    """Return whether another descriptor holds a lock, shared or not, on these bytes."""
    for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK):
        request = struct.pack("hhqqi4x", kind, os.SEEK_SET, place, length, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        except OSError:
            return True
    return False


def quantile_ms(histogram: Any, fraction: float) -> float:
    """Return the upper end of the bucket that contains the quantile, at most a fifth too high."""
    bucket = int(np.searchsorted(np.cumsum(histogram), fraction * histogram.sum()))
    return float(2 ** ((bucket + 1) / 4) / 1e3)


def waiting_places(pid: int) -> list[str]:
    places = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        try:
            places.append((task / "wchan").read_text() or "user")
        except OSError:
            places.append("gone")
    return places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--handlers", nargs="+", choices=HANDLERS, default=list(HANDLERS), help="only these")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the tables are made")
    options = parser.parse_args()
    try:
        figures = run_storm(options.dir, signals=options.signals, seed=options.seed, handlers=options.handlers)
    except StormError as error:
        sys.exit(f"FAILED: {error}")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
