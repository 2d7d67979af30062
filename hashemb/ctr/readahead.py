"""Reading and learning at once: a thread parses the next batches while the caller works on this one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Iterate over `items` from a thread of its own, at most `depth` items ahead.

    The order is kept, an exception of `items` is raised here in its place, and closing the iterator ends the
    thread.

    Parameters
    ----------
    items : iterable
        Advanced by the thread only.
    depth : int
        Items held ready, >= 1.

    Examples
    --------
    >>> list(read_ahead(range(3)))
    [0, 1, 2]
    """
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | None, error: BaseException | None, more: bool) -> None:
        while not stop.is_set():
            try:
                ready.put((item, error, more), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None, True)
                if stop.is_set():
                    return
        except BaseException as error:
            put(None, error, False)
        else:
            put(None, None, False)

    thread = threading.Thread(target=work, name="hashemb-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, more = ready.get()
            if error is not None:
                raise error
            if not more:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
