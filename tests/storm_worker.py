"""One process of the storm (storm.py): it works on a table in a loop, while signal handlers use the table too.

Whatever a signal interrupts, calls in the loop and the handlers may only have documented outcomes: a result, a
`TableBusyError` if the same thread is inside another call on the table, a `ClosedTableError` after a handler has closed
it, or the `Interrupt` that a handler raises. Everything else is a failure, which is reported with its traceback.

Signals also arrive in the code of the loop itself. Handlers therefore only append to deques, which is atomic in the
interpreter, and raise only while the loop is armed for it, once.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import random
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from storm_parts import (
    BUSY,
    DIM,
    FINISH,
    HANDLERS,
    LOOP,
    MAX_DEPTH,
    ROLES,
    SIZES,
    STORM,
    Board,
    bucket_of,
    create,
    descriptors,
    expect,
    expect_clean,
    is_closed,
    left_open,
)

import hashemb
from hashemb import errors


class Interrupt(BaseException):
    """The exception that a handler raises; like KeyboardInterrupt it is a BaseException."""


class Worker:
    """The loop and its handlers."""

    def __init__(self, root: Path, number: int, seed: int, num_workers: int, handlers: list[str]) -> None:
        self.handlers = {what: HANDLERS[what] for what in handlers}
        self.root, self.number, self.role = root, number, ROLES[number % len(ROLES)]
        self.board = Board(root / "board", num_workers)
        self.random, self.rng = random.Random(f"{seed} {number}"), np.random.default_rng([seed, number])
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.events: deque[tuple[str, str, str]] = deque()
        self.discarded: deque[Path] = deque()
        self.failures: deque[str] = deque()
        self.signals, self.names = itertools.count(1), itertools.count()
        self.depth, self.armed, self.handled, self.has_alarm = 0, False, 0, False
        self.batches = self.make_batches()
        self.table: Any = None
        self.replica: Any = None
        self.last: Any = None  # the last delta applied to the replica
        self.pending: Path | None = None  # a delta that was exported but not yet applied
        self.chains = itertools.count()
        self.replica_path = self.place("replica")

    def make_batches(self) -> list[tuple[Any, Any]]:
        """Make batches with repeated keys, shared by all workers or only for this one, and small whole gradients."""
        batches = []
        for size, often in SIZES.items():
            for _ in range(often):
                keys = self.rng.integers(0, 1 << 20, size)
                keys[: size // 3] = self.rng.integers(0, 100, size // 3)
                grads = self.rng.integers(-2, 3, (size, DIM)).astype(np.float32) / 1024
                batches.append((keys, grads))
        return batches

    def place(self, kind: str) -> Path:
        """Return an unused name in the root."""
        return self.root / f"{kind}-{self.number}-{next(self.names)}"

    # -- outcomes --

    def attempt(self, where: str, what: str, operation: Callable[[], Any], *, armed: bool = False) -> str:
        """Run an operation and record its outcome. With `armed`, a handler may end it by an exception, once."""
        outcome = "ok"
        try:
            self.armed = armed
            operation()
            self.armed = False
        except BaseException as error:
            self.armed = False
            outcome = self.judge(where, what, error)
        self.events.append((where, what, outcome))
        return outcome

    def judge(self, where: str, what: str, error: BaseException) -> str:
        if isinstance(error, Interrupt) and where == "loop":
            return "interrupted"
        if isinstance(error, BUSY) and where == "handler":
            return "busy"  # outside handlers this thread is in no other call
        if isinstance(error, errors.ClosedTableError):
            return "closed"
        self.failures.append(f"{where}, {what}:\n{''.join(traceback.format_exception(error))}")
        self.board["has_failed"][self.number] = 1
        return "other"

    # -- actions of the loop and the handlers --

    def batch(self) -> tuple[Any, Any]:
        return self.random.choice(self.batches)

    def update(self) -> None:
        self.table.update(*self.batch())

    def lookup(self) -> None:
        table = self.replica if self.random.random() < 0.3 else self.table
        table.lookup(self.batch()[0])

    def stats(self) -> None:
        self.table.stats(exact=self.random.random() < 0.3)

    def flush(self) -> None:
        self.table.flush()

    def prefetch(self) -> None:
        self.table.prefetch(self.batch()[0])

    def lr(self) -> None:
        self.table.lr = self.random.uniform(0.01, 0.1)

    def close(self) -> None:
        (self.replica if self.random.random() < 0.2 else self.table).close()

    def snapshot(self) -> None:
        path = self.place("snapshot")
        self.discarded.append(path)
        self.table.snapshot(path)

    def export(self) -> None:
        path = self.place("handler.delta")
        self.discarded.append(path)
        self.table.export_delta(None, path)

    # -- signals --

    def on_signal(self, number: int, _frame: Any) -> None:
        self.board["signals"][self.number] = next(self.signals)
        self.handled += 1
        if number == signal.SIGALRM:
            self.has_alarm = False
        if self.depth >= MAX_DEPTH or self.board.phase[0] != STORM:
            return
        what = self.random.choices(list(self.handlers), list(self.handlers.values()))[0]
        if what == "raise":
            self.raise_once()
        elif what != "nothing":
            self.depth += 1
            self.attempt_in_handler(what)
            self.depth -= 1

    def raise_once(self) -> None:
        if self.armed and self.depth == 0:
            self.armed = False
            self.events.append(("handler", "raise", "ok"))
            raise Interrupt

    def attempt_in_handler(self, what: str) -> None:
        """Run an action in a handler without changing `armed`: an exception now would be raised in the handler."""
        try:
            getattr(self, what)()
            outcome = "ok"
        except Exception as error:
            outcome = self.judge("handler", what, error)
        self.events.append(("handler", what, outcome))

    def set_alarm(self) -> None:
        """Set a timer, if none is pending, to a time between the duration of the smallest update and of a snapshot."""
        if not self.has_alarm:
            self.has_alarm = True
            signal.setitimer(signal.ITIMER_REAL, 10 ** self.random.uniform(-5.3, -1.5))

    # -- the loop --

    def run(self) -> None:
        while self.board.phase[0] == STORM and not self.failures:
            self.reopen()
            self.set_alarm()
            what = self.random.choices(list(LOOP), list(LOOP.values()))[0]
            if what == "update":
                self.timed_update()
            elif what == "delta":
                self.delta()
            else:
                self.attempt("loop", what, getattr(self, what), armed=True)
            self.board["beats"][self.number] += 1
            self.board["signals_before"][self.number] = self.board["signals"][self.number]
            self.board["last_beat_ns"][self.number] = time.monotonic_ns()
            self.tidy()

    def reopen(self) -> None:
        """Reopen what handlers, or an interrupted call, have closed."""
        isolation: Any = self.role.isolation
        if self.table is None or is_closed(self.table):
            self.table = hashemb.open(self.root / "table", "r+", isolation=isolation)
        if self.replica is None or is_closed(self.replica):
            if not self.replica_path.exists():
                create(self.replica_path).close()
            self.replica = hashemb.open(self.replica_path, "r+")

    def timed_update(self) -> None:
        """Update, and record the time it waited, which is known if no handler ran: wall time less processor time."""
        handled, began_ns, cpu_ns = self.handled, time.monotonic_ns(), time.thread_time_ns()
        outcome = self.attempt("loop", "update", self.update, armed=True)
        held_ns = time.monotonic_ns() - began_ns - (time.thread_time_ns() - cpu_ns)
        if outcome == "ok" and handled == self.handled:
            self.board.held[self.number, bucket_of(held_ns)] += 1
            longest = self.board["longest_held_ns"]
            longest[self.number] = max(longest[self.number], held_ns)

    def delta(self) -> None:
        """Export the next delta of the chain to the replica, or apply it if it has been exported."""
        if self.pending is None:
            path = self.place("link.delta")
            self.attempt("loop", "export", lambda: self.table.export_delta(self.last, path), armed=True)
            self.pending = path if path.exists() else None
            return
        if self.attempt("loop", "apply", self.apply, armed=True) == "ok":
            self.last, done = hashemb.delta_info(self.pending), self.pending
            self.pending = None
            done.unlink()

    def apply(self) -> None:
        try:
            hashemb.apply_delta(self.replica, self.pending)  # type: ignore[arg-type]
        except errors.DeltaError as error:
            if error.reason != "applied":  # by a call that was interrupted after it had finished
                raise

    def tidy(self) -> None:
        """Record the events; verify a sample of the snapshots, and remove them."""
        while self.events:
            self.counts[self.events.popleft()] += 1
        for _ in range(len(self.discarded)):
            path = self.discarded.popleft()
            if path.is_dir():
                if self.random.random() < 0.2:
                    self.attempt("loop", "verify", lambda path=path: expect_clean(path))
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()

    def work_beside(self) -> None:
        """Run the second thread: it uses the open table, which handlers of the first thread may close."""
        rng = random.Random(self.number)
        while self.board.phase[0] == STORM and not self.failures:
            table, (keys, grads) = self.table, rng.choice(self.batches)
            if table is None:
                continue
            what = rng.choice(["update", "lookup", "stats"])
            arguments = {"update": (keys, grads), "lookup": (keys,), "stats": ()}[what]
            try:
                getattr(table, what)(*arguments)
                outcome = "ok"
            except Exception as error:
                outcome = self.judge("thread", what, error)
            self.events.append(("thread", what, outcome))

    # -- the end --

    def finish(self) -> None:
        """Check, after all processes have stopped, that the replica equals its source."""
        self.tidy()
        self.reopen()
        self.replica.close()  # complete what was interrupted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.replica = hashemb.open(self.replica_path, "r+")
        if self.pending is not None:
            self.apply()
            self.last = hashemb.delta_info(self.pending)
        path = self.place("last.delta")
        self.table.export_delta(self.last, path)
        hashemb.apply_delta(self.replica, path)
        same = np.array_equal(self.table.weight, self.replica.weight)
        self.attempt("loop", "compare", lambda: expect(same, "the replica differs from its source"))
        self.table.close()
        self.replica.close()
        self.attempt("loop", "verify", lambda: expect_clean(self.replica_path))
        self.tidy()


def work(root: Path, number: int, seed: int, num_workers: int, handlers: list[str]) -> None:
    """Run the process: work until it is told to be idle, then finish, and write the results to `root`."""
    warnings.simplefilter("ignore", RuntimeWarning)  # about a replica with an interrupted delta
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(root / f"stacks-{number}", "w", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        worker = Worker(root, number, seed, num_workers, handlers)
        hashemb.set_num_threads(worker.role.num_threads)
        opened = descriptors()
        worker.reopen()
        worker.board["last_beat_ns"][number] = time.monotonic_ns()
        storm(worker)
        worker.board["is_idle"][number] = 1
        while worker.board.phase[0] != FINISH:
            time.sleep(0.01)
        if not worker.failures:
            worker.finish()
        write_results(worker, opened)


def storm(worker: Worker) -> None:
    """Run the loop, and a second thread if the role has one, until the phase changes."""
    for which in (signal.SIGUSR1, signal.SIGALRM):
        signal.signal(which, worker.on_signal)
    second = threading.Thread(target=worker.work_beside)
    if worker.role.has_thread:
        second.start()
    try:
        worker.run()
    except BaseException as error:
        worker.judge("loop", "own code", error)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if worker.role.has_thread:
        second.join()


def write_results(worker: Worker, opened: Counter[str]) -> None:
    results = {
        "counts": [[*key, count] for key, count in sorted(worker.counts.items())],
        "signals": next(worker.signals) - 1,
        "left_open": left_open(opened),
        "failures": list(worker.failures),
    }
    (worker.root / f"results-{worker.number}.json").write_text(json.dumps(results), encoding="utf-8")

