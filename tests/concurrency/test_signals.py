"""Signal handlers and callbacks that use the table during a call get a result, or `TableBusyError` at once.

Calls that could hang run in a child process with a time limit.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import _sharing
from hashemb._files import recovery
from hashemb.errors import ClosedTableError, TableBusyError

OPTIONS: dict[str, Any] = {"num_embeddings": 2**14, "embedding_dim": 8}
KEYS, GRADS = np.arange(4000), np.ones((4000, 8), np.float32)
_F_OFD_SETLK = 37


class Interrupt(BaseException):
    """The exception that a handler raises; like KeyboardInterrupt it is a BaseException."""


@pytest.fixture
def table(tmp_path: Path) -> Iterator[hashemb.EmbeddingTable]:
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        table.update(KEYS, GRADS)
        yield table


def gate_is_free(path: str) -> bool:
    """Return whether no batch is in flight: another open file can lock the gate."""
    fd = os.open(os.path.join(path, "lock"), os.O_RDWR)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, _sharing.LOCK_GATE, 1, 0))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def run(script: str, *arguments: Any, timeout_s: float = 60.0) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- exceptions from a handler ----


def test_an_exception_from_a_handler_never_leaves_the_gate_locked(tmp_path: Path) -> None:
    """Interrupt batches of three keys anywhere. One interrupt in six used to leave the gate locked."""
    keys, grads, interrupts = np.arange(3), np.ones((3, 8), np.float32), 0

    def interrupt(*_: Any) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with hashemb.create(tmp_path / "t", **OPTIONS) as table:
            for delay in np.random.default_rng(5).uniform(5e-5, 6e-4, 400):
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    while True:
                        table.update(keys, grads)
                except Interrupt:
                    interrupts += 1
                assert gate_is_free(table.path), f"the gate is locked after {interrupts} interrupts"
            assert interrupts == 400
            table.snapshot(tmp_path / "s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hashemb.verify(tmp_path / "s") == []


HANDLED = """
    import os, signal, sys, time
    import numpy as np
    import hashemb

    table, what, calls, inside = hashemb.open(sys.argv[1], "r+"), sys.argv[2], [0], []
    keys, grads = np.arange(2000), np.ones((2000, 8), np.float32)

    def handler(*_):
        if inside:  # another signal, in the middle of the first one's call: that is the storm's business
            return
        inside.append(True)
        calls[0] += 1
        if what == "update":
            table.update(keys[:10], grads[:10])
        elif what == "snapshot":
            table.snapshot(f"{sys.argv[1]}.s{calls[0]}")
        elif what == "export_delta":
            table.export_delta(None, f"{sys.argv[1]}.{calls[0]}.delta")
        else:
            table.close()
            table.__init__(sys.argv[1], "r+")
        inside.clear()

    signal.signal(signal.SIGALRM, handler)
    done, closed = 0, 0
    while calls[0] < 30:
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.001 * np.random.default_rng(calls[0]).random())
        for _ in range(20):
            try:
                table.update(keys, grads)
            except hashemb.errors.ClosedTableError:
                closed += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    table.close()
    print(calls[0])
"""


@pytest.mark.parametrize("what", ["update", "snapshot", "export_delta", "close"])
def test_a_handler_in_the_middle_of_updates_gets_its_result(tmp_path: Path, what: str) -> None:
    hashemb.create(tmp_path / "t", **OPTIONS).close()
    assert int(run(HANDLED, tmp_path / "t", what)) >= 30
    assert hashemb.verify(tmp_path / "t") == []


# ---- calls within calls ----


def once(act: Callable[[], Any]) -> tuple[Callable[..., None], list[BaseException]]:
    """Return a progress callback that calls `act` the first time, and a list of what that raised."""
    raised: list[BaseException] = []

    def callback(*_: Any) -> None:
        if not raised:
            with pytest.raises(TableBusyError) as caught:
                act()
            raised.append(caught.value)

    return callback, raised


def test_points_in_time_within_one_another_are_refused(table: hashemb.EmbeddingTable, tmp_path: Path) -> None:
    inner: list[Callable[[], Any]] = [
        lambda: table.snapshot(tmp_path / "inner"),
        lambda: table.export_delta(None, tmp_path / "inner.delta"),
        table.close,
    ]
    for number, act in enumerate(inner):
        callback, raised = once(act)
        table.snapshot(tmp_path / f"s{number}", progress=callback)
        assert len(raised) == 1
    callback, raised = once(inner[1])
    table.export_delta(None, tmp_path / "d", progress=callback)
    assert len(raised) == 1
    assert not (tmp_path / "inner").exists()
    assert not (tmp_path / "inner.delta").exists()


def test_whatever_would_wait_for_a_delta_being_applied_is_refused(
    table: hashemb.EmbeddingTable, tmp_path: Path
) -> None:
    table.export_delta(None, tmp_path / "d")
    acts: list[Callable[[hashemb.EmbeddingTable, hashemb.EmbeddingTable], Any]] = [
        lambda replica, other: replica.update(KEYS, GRADS),
        lambda replica, other: other.update(KEYS, GRADS),
        lambda replica, other: replica.close(),
        lambda replica, other: replica.snapshot(tmp_path / "s"),
        lambda replica, other: hashemb.apply_delta(other, tmp_path / "d"),
    ]
    for number, act in enumerate(acts):
        path = tmp_path / f"r{number}"
        with hashemb.create(path, **OPTIONS) as replica, hashemb.open(path, "r+") as other:
            callback, raised = once(functools.partial(act, replica, other))
            hashemb.apply_delta(replica, tmp_path / "d", progress=callback)
            assert len(raised) == 1
            np.testing.assert_array_equal(replica.lookup(KEYS), table.lookup(KEYS))


# ---- close in another thread ----


@pytest.mark.parametrize("call", ["snapshot", "export_delta", "flush", "stats", "update", "lookup", "lr"])
def test_closing_under_a_call_of_another_thread_is_a_closed_table(tmp_path: Path, call: str) -> None:
    for attempt in range(4):
        table = hashemb.create(tmp_path / f"t{attempt}", **OPTIONS)
        table.update(KEYS, GRADS)
        raised: list[BaseException] = []
        started, number = threading.Event(), [0]

        def act(table: hashemb.EmbeddingTable = table, attempt: int = attempt, number: list[int] = number) -> None:
            number[0] += 1
            if call == "snapshot":
                table.snapshot(tmp_path / f"s{attempt}.{number[0]}")
            elif call == "export_delta":
                table.export_delta(None, tmp_path / f"d{attempt}.{number[0]}")
            elif call == "stats":
                table.stats(exact=True)
            elif call == "update":
                table.update(KEYS, GRADS)
            elif call == "lookup":
                table.lookup(KEYS)
            elif call == "lr":
                table.lr = table.lr
            else:
                table.flush()

        def loop(
            act: Callable[[], None] = act, started: threading.Event = started, raised: list[Any] = raised
        ) -> None:
            with pytest.raises(BaseException) as caught:  # noqa: PT011, PT012
                while True:
                    act()
                    started.set()
            raised.append(caught.value)

        threads = [threading.Thread(target=loop) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert started.wait(30)
        time.sleep(0.01 * attempt)
        table.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert [type(error) for error in raised] == 2 * [ClosedTableError], raised
        assert hashemb.verify(tmp_path / f"t{attempt}") == []
        assert hashemb.info(tmp_path / f"t{attempt}").clean


def test_closing_under_an_update_that_waits_at_the_gate(tmp_path: Path) -> None:
    """Its lock file may not be closed meanwhile: the update went on with whatever file had the number by then."""
    path, raised = tmp_path / "t", []
    with hashemb.create(path, **OPTIONS) as other:
        table = hashemb.open(path, "r+")
        table.update(KEYS, GRADS)  # has joined the writers

        def update() -> None:
            with pytest.raises(BaseException) as caught:  # noqa: PT011
                table.update(KEYS, GRADS)
            raised.append(caught.value)

        files = other._open_files()
        gate = _sharing.ClosedGate(files.fd("lock"), files.calls, files.arrays["control"])
        with files.turn("apply_delta") as _, gate:
            thread = threading.Thread(target=update)
            thread.start()
            time.sleep(0.2)
            assert thread.is_alive()
            table.close()
            thread.join(30)
            assert not thread.is_alive()
        assert [type(error) for error in raised] == [ClosedTableError]
        other.update(KEYS, GRADS)
        assert other.step == 2
    assert hashemb.info(path).clean


@pytest.mark.parametrize("by", ["handler", "thread"])
def test_closing_in_the_middle_of_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The files were closed under the first call, which then failed on the directory."""
    table, seal, ended = hashemb.create(tmp_path / "t", **OPTIONS), recovery.seal, []
    table.update(KEYS, GRADS)
    thread = threading.Thread(target=lambda: ended.append(table.close()))

    def seal_late(*arguments: Any) -> None:
        if by == "handler":
            with pytest.raises(TableBusyError, match="close"):
                table.close()
        else:
            thread.start()
            time.sleep(0.2)
            assert ended == []  # it waits
        seal(*arguments)

    monkeypatch.setattr(recovery, "seal", seal_late)
    files = table._open_files()
    table.close()
    if by == "thread":
        thread.join(30)
        assert ended == [None]
    assert files.directory.fd == -1
    assert hashemb.info(tmp_path / "t").clean
    table.close()


# ---- arrays that change during a call ----


def test_offsets_that_change_during_a_call_are_used_as_they_were_checked(tmp_path: Path) -> None:
    script = """
        import sys, threading, time
        import numpy as np
        import hashemb

        table = hashemb.open(sys.argv[1], "r+")
        keys, offsets, end = np.arange(4000), np.arange(4001), time.monotonic() + 3
        grads = np.ones((4000, 8), np.float32)

        def change():
            while time.monotonic() < end:
                offsets[1000] = 2**40
                offsets[1000] = 1000

        thread = threading.Thread(target=change)
        thread.start()
        refused = 0
        while time.monotonic() < end:
            for call, arguments in ((table.lookup, [keys]), (table.update, [keys, grads])):
                try:
                    call(*arguments, offsets=offsets)
                except ValueError:
                    refused += 1
        thread.join()
        table.close()
        print("survived", refused)
    """
    hashemb.create(tmp_path / "t", **OPTIONS).close()
    assert run(script, tmp_path / "t").startswith("survived")


def test_gradients_that_change_during_an_update_bring_no_nan_into_the_table(tmp_path: Path) -> None:
    grads, end = GRADS.copy(), time.monotonic() + 3
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            grads[1000:3000] = np.nan
            grads[1000:3000] = 1.0

    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        thread = threading.Thread(target=change)
        thread.start()
        try:
            messages = set()
            while time.monotonic() < end and len(messages) < 2:
                try:
                    table.update(KEYS, grads)
                except ValueError as error:
                    messages.add("changed" if "were changed while" in str(error) else "refused")
        finally:
            stop.set()
            thread.join()
        assert "refused" in messages
        assert np.isfinite(table.weight).all()
    assert hashemb.verify(tmp_path / "t") == []


def test_sums_and_products_that_overflow_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with hashemb.create(tmp_path / "t", **OPTIONS) as table:
        big = np.full((2, 8), 3e38, np.float32)
        with pytest.raises(ValueError, match="add up to more than float32"):
            table.update([7, 7], big)
        with pytest.raises(ValueError, match=r"times its weight 10\.0, is too large"):
            table.update([7, 9], big[:1], offsets=[0, 2], per_sample_weights=np.array([10, 1], np.float32))
        assert table.step == 0
        assert not table.weight.any()
