"""Reading and learning at once: a thread parses the next batches while the caller works on this one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")


def read_ahead(
    items: Iterable[T], depth: int = 2, *, at_leisure: Callable[[T], T] | None = None
) -> Generator[T, None, None]:
    """Iterate over `items` from a thread of its own, at most `depth` items ahead.

    The order is kept, an exception of `items` is raised here in its place, and closing the iterator ends the
    thread.

    Parameters
    ----------
    items : iterable
        Advanced by the thread only.
    depth : int
        Items held ready, >= 1.
    at_leisure : callable, optional
        What the thread does to an item while half of `depth` or more are ready: work that the caller does otherwise.

    Examples
    --------
    >>> list(read_ahead(range(3)))
    [0, 1, 2]
    """
    buffer: _Buffer[T] = _Buffer(depth, at_leisure)
    thread = threading.Thread(target=buffer.fill, args=(items,), name="hashemb-read-ahead", daemon=True)
    thread.start()
    try:
        yield from buffer.take()
    finally:
        buffer.stop()
        thread.join()


class _Buffer(Generic[T]):
    """Items between two threads.

    Once full it is filled again only when half empty: to wake a thread costs as much as to learn from some of them.
    """

    def __init__(self, depth: int, at_leisure: Callable[[T], T] | None) -> None:
        self._depth, self._at_leisure = depth, at_leisure
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_stopped = self._is_done = False
        self._error: BaseException | None = None

    def fill(self, items: Iterable[T]) -> None:
        """Take all items, or as many as are wanted; keep what they raise."""
        try:
            for item in items:
                if self._at_leisure is not None and 2 * len(self._ready) >= self._depth:
                    item = self._at_leisure(item)
                if not self._put(item):
                    return
        except BaseException as error:
            self._error = error
        with self._changed:
            self._is_done = True
            self._changed.notify_all()

    def _put(self, item: T) -> bool:
        with self._changed:
            self._ready.append(item)
            if len(self._ready) == 1:
                self._changed.notify_all()
            if len(self._ready) >= self._depth:
                self._changed.wait_for(lambda: self._is_stopped or len(self._ready) <= self._depth // 2)
            return not self._is_stopped

    def take(self) -> Iterator[T]:
        """The items in order, then their exception."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._is_done)
                if not self._ready:
                    break
                item = self._ready.popleft()
                if len(self._ready) == self._depth // 2:
                    self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """No more items are wanted."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
