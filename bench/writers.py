"""Writers in processes of their own, each on one thread, for the questions of sharing: they write so many batches and
say how long that took, or write until they are told to stop and say when each batch was under way.

Times are of `time.perf_counter`, which on Linux is one clock for all processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import hashemb
from bench import workload
from bench.harness import Mismatch
from bench.workload import Case

DIFFERENT_BATCHES = 24
Times = npt.NDArray[np.float64]
#: A batch of a log: when it began, when it ended, and of that what it waited at the gate, and what it spent on new
#: blocks and on rows that a snapshot wants saved.
LOG_FIELDS = ("begin", "end", "gate_s", "saving_s")


class Writer:
    """The process and the pipe to it."""

    def __init__(self, path: str, case: Case, isolation: str, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, path, case, isolation, number), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *message: Any) -> None:
        self.pipe.send(message)

    def answer(self, timeout_s: float = 600.0) -> Any:
        if not self.pipe.poll(timeout_s):
            raise Mismatch(f"a writer gave no answer in {timeout_s} s")
        answer = self.pipe.recv()
        if isinstance(answer, str):
            raise Mismatch(f"a writer failed:\n{answer}")
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join(60)
        self.process.kill()
        self.process.join()
        self.process.close()


@contextlib.contextmanager
def writers(path: str, case: Case, isolation: str, count: int) -> Iterator[list[Writer]]:
    """`count` of them with the table open and their batches ready."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(contextlib.closing(Writer(path, case, isolation, i))) for i in range(count)]
        for writer in started:
            writer.answer()
        yield started


# ---- in the process ----


def serve(pipe: Any, path: str, case: Case, isolation: str, number: int) -> None:
    hashemb.set_num_threads(1)
    try:
        with hashemb.open(path, "r+", isolation=isolation) as table:
            batches = [workload.keys_for(case, number * 1000 + i).reshape(-1) for i in range(DIFFERENT_BATCHES)]
            grads = workload.gradients(case.num_keys, case.dim)
            table.update(batches[0], grads)
            pipe.send(True)
            while True:
                what, *rest = pipe.recv()
                pipe.send(WORK[what](table, batches, grads, *rest, pipe))
    except EOFError:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())


def write_some(table: hashemb.EmbeddingTable, batches: list[Any], grads: Any, count: int, pipe: Any) -> float:
    """Seconds for `count` batches."""
    began = time.perf_counter()
    for i in range(count):
        table.update(batches[i % len(batches)], grads)
    return time.perf_counter() - began


class TimedCore:
    """A table's core that notes how long its batches waited at the gate."""

    def __init__(self, core: Any) -> None:
        self.core, self.gate_s = core, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def enter_gate(self, lock_fd: int) -> None:
        began = time.perf_counter()
        self.core.enter_gate(lock_fd)
        self.gate_s = time.perf_counter() - began


def write_until_told(table: Any, batches: list[Any], grads: Any, pipe: Any) -> Times:
    """The log, (batches, LOG_FIELDS), of writing until a message comes."""
    core, files, log = TimedCore(table._core), table._files, []
    saving: list[Any] = [timed(files.reserve), timed(files.save_rows)]
    table._core, files.reserve, files.save_rows = core, *saving
    try:
        while not pipe.poll():
            began, before = time.perf_counter(), sum(part.seconds for part in saving)
            table.update(batches[len(log) % len(batches)], grads)
            spent = sum(part.seconds for part in saving) - before
            log.append((began, time.perf_counter(), core.gate_s, spent))
        pipe.recv()
    finally:
        table._core = core.core
        del files.reserve, files.save_rows
    return np.array(log)


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which adds up in its attribute `seconds` how long it took, and notes when it `ended`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            run.ended = time.perf_counter()  # type: ignore[attr-defined]
            run.seconds += run.ended - began  # type: ignore[attr-defined]

    run.seconds = 0.0  # type: ignore[attr-defined]
    return run


WORK: dict[str, Callable[..., Any]] = {"some": write_some, "until told": write_until_told}
