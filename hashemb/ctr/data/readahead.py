"""Read-ahead: a thread parses the next batches while the caller works on the current one."""

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
    """Iterate over `items` in a separate thread, at most `depth` items ahead.

    The order is kept, an exception in `items` is raised here at its position, and closing the iterator ends the
    thread.

    Parameters
    ----------
    items : iterable
        The items; only the thread advances the iterator.
    depth : int
        Number of items that are buffered, >= 1.
    at_leisure : callable, optional
        Optional preprocessing that the reader thread applies to an item while the buffer is at least half full; the
        caller does this work for the other items.

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
    """A buffer of items between two threads.

    Once full, it is refilled only when it is half empty: waking a thread costs as much as learning several items. A
    `queue.Queue` wakes the reader for each item, and its `put` cannot be interrupted when the caller stops.
    """

    def __init__(self, depth: int, at_leisure: Callable[[T], T] | None) -> None:
        self._depth, self._at_leisure = depth, at_leisure
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_stopped = self._is_done = False
        self._error: BaseException | None = None

    def fill(self, items: Iterable[T]) -> None:
        """Buffer all items until `stop` is called; store an exception that they raise."""
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
        """Yield the items in order, then raise their exception."""
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
        """Signal that no more items are needed."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
