"""A second process that calls tables on request, for tests of sharing. It is spawned, so it inherits no state.

with Worker() as other:
    other.call("t.emb", "r+", "update", keys, grads)      # opens, calls, closes
    other.open("t.emb", "r")                              # keeps it open for the calls that follow
    other.call("t.emb", "r", "lookup", keys)
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import hashemb

TIMEOUT_S = 60.0


class Worker:
    """The process and the pipe to it; an exception in the process is raised in the caller."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, path: os.PathLike[str] | str, mode: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return `getattr(hashemb.open(path, mode), method)(*args, **kwargs)`, or the attribute if it is no method."""
        return self.request("call", str(path), mode, method, args, kwargs)

    def open(self, path: os.PathLike[str] | str, mode: str) -> None:
        """Keep a table open for the calls that follow."""
        self.request("open", str(path), mode)

    def close(self, path: os.PathLike[str] | str) -> None:
        self.request("close", str(path))

    def request(self, *message: Any) -> Any:
        self.pipe.send(message)
        return self.answer()

    def answer(self) -> Any:
        if not self.pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"the worker did not answer within {TIMEOUT_S} s")
        result = self.pipe.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(TIMEOUT_S)
        self.process.kill()
        self.process.join()
        self.process.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def serve(pipe: Connection) -> None:
    """Answer requests until the other end is closed."""
    tables: dict[str, hashemb.EmbeddingTable] = {}
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(answer(tables, *message))
        except Exception as error:
            pipe.send(error)
    for table in tables.values():
        table.close()


def answer(tables: dict[str, hashemb.EmbeddingTable], request: str, path: str, *rest: Any) -> Any:
    if request == "open":
        tables[path] = hashemb.open(path, *rest)
        return None
    if request == "close":
        return tables.pop(path).close()
    if request == "maps":
        return mapped_bytes(path, *rest)
    if request == "read":
        tables[path].lookup(*rest)
        return None
    mode, method, args, kwargs = rest
    if path in tables:
        return apply(tables[path], method, args, kwargs)
    with hashemb.open(path, mode) as table:
        return apply(table, method, args, kwargs)


def apply(table: hashemb.EmbeddingTable, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if method == "lr=":
        table.lr = args[0]
        return None
    value = getattr(table, method)
    return value(*args, **kwargs) if callable(value) else value


def mapped_bytes(path: str, *kinds: str) -> dict[str, int]:
    """Return the bytes of this process's mappings of files below `path` by kind ("Rss", …), according to smaps."""
    totals = dict.fromkeys(kinds, 0)
    inside = False
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):
                inside = path in line
            elif inside and words[0][:-1] in totals:
                totals[words[0][:-1]] += int(words[1]) * 1024
    return totals
