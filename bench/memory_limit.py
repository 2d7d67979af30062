"""A memory control group (v1 or v2) for a child process, and a cold page cache. Both need root, else raise `Skip`."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

from bench.harness import Skip

ROOT = pathlib.Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited_group(limit_bytes: int) -> Iterator[pathlib.Path]:
    """Yield the file to which a child writes its process id to put its memory and page cache under the limit."""
    version_1 = (ROOT / "memory").is_dir()
    group = (ROOT / "memory" if version_1 else ROOT) / f"hashemb-bench-{os.getpid()}"
    try:
        if not version_1:
            (ROOT / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        raise Skip(f"no memory control group can be made: {error}") from None
    try:
        limit(group, limit_bytes, version_1)
        yield group / "cgroup.procs"
    finally:
        remove(group)


def limit(group: pathlib.Path, limit_bytes: int, version_1: bool) -> None:
    try:
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        swap = group / ("memory.swappiness" if version_1 else "memory.swap.max")
        if swap.exists():
            swap.write_text("0")
    except OSError as error:
        raise Skip(f"no memory limit can be set: {error}") from None


def remove(group: pathlib.Path) -> None:
    """Remove a group, which is possible only a moment after its last process has ended."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)
    group.rmdir()


def drop_page_cache() -> None:
    os.sync()
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as error:
        raise Skip(f"the page cache cannot be dropped: {error}") from None
