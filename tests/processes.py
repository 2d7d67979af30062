"""Processes for tests of sharing: run a function in several at once, fork children that must not hang, and wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest

TIMEOUT_S = 120.0


def in_processes(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, method: str = "forkserver"
) -> list[Any]:
    """Call `work(*args)` for each tuple in its own process, all starting at the same moment; return the results.

    An exception in a process fails the test, and so does a process that is killed or hangs.
    """
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["hashemb"])
    barrier, started = context.Barrier(len(arguments)), []
    try:
        for args in arguments:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(theirs, barrier, work, args), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads: tested here
                process.start()
            theirs.close()
            started.append((process, ours))
        return [_receive(process, pipe) for process, pipe in started]
    finally:
        for process, pipe in started:
            pipe.close()
            process.kill()
            process.join()
            process.close()


def _answer(pipe: Any, barrier: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        barrier.wait(TIMEOUT_S)
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _receive(process: Any, pipe: Any) -> Any:
    if not pipe.poll(TIMEOUT_S):
        pytest.fail(f"process {process.pid} gave no answer within {TIMEOUT_S} s")
    try:
        succeeded, answer = pipe.recv()
    except EOFError:
        process.join(TIMEOUT_S)
        pytest.fail(f"process {process.pid} ended without an answer, exit code {process.exitcode}")
    if not succeeded:
        pytest.fail(f"process {process.pid} failed:\n{answer}")
    return answer


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def in_forked_child(work: Callable[[], None], timeout_s: float = 60.0) -> None:
    """Run `work` in a fork of this process; its exceptions fail the test, and so does a child that hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.002)
    assert os.waitstatus_to_exitcode(status) == 0, "the forked child failed: see its traceback"
