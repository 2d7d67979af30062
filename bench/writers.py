"""Single-threaded writer processes for the sharing benchmark.

A writer either writes a number of batches and returns how long that took, or writes until it is told to stop and
returns the begin and end of each batch. Times are from `time.perf_counter`, which on Linux is one clock for all
processes.
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
#: The fields of a log for each batch: when it began, and when it ended.
LOG_FIELDS = ("begin", "end")


class Writer:
    """A writer process and the pipe to it."""

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
    """Start `count` writers with the table open and their batches ready."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(contextlib.closing(Writer(path, case, isolation, i))) for i in range(count)]
        for writer in started:
            writer.answer()
        yield started


# ---- child process ----


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
    """Write `count` batches and return the seconds they took."""
    began = time.perf_counter()
    for i in range(count):
        table.update(batches[i % len(batches)], grads)
    return time.perf_counter() - began


def write_until_told(table: hashemb.EmbeddingTable, batches: list[Any], grads: Any, pipe: Any) -> Times:
    """Write until a message arrives and return the log, (batches, LOG_FIELDS)."""
    log = []
    while not pipe.poll():
        began = time.perf_counter()
        table.update(batches[len(log) % len(batches)], grads)
        log.append((began, time.perf_counter()))
    pipe.recv()
    return np.array(log)


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to add up its time in the attribute `seconds` and to record when it `ended`."""

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
