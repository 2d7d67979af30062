"""Restoring on file systems that share extents between files: clones take no space until one of them changes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_restore import OPTIONS, content, names, train

import hashemb
from hashemb import errors, restore, verify
from hashemb._files import building as _building
from hashemb._files import directory as _directory


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if not shutil.which(f"mkfs.{request.param}"):
        pytest.skip(f"mkfs.{request.param} is not installed")
    image, target = tmp_path / "image", tmp_path / "disk"
    image.touch()
    target.mkdir()
    os.truncate(image, 400 << 20)
    for command in ([f"mkfs.{request.param}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(target)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no {request.param} here: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_files_that_share_their_space(sharing_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied, everything is checked, and later changes are independent."""
    with hashemb.create(sharing_disk / "t", **OPTIONS) as table:
        train(table, 0)
        table.snapshot(sharing_disk / "s")
    monkeypatch.setattr("hashemb._files.blocks.write_blocks", None)
    before = content(sharing_disk / "s")
    restore(sharing_disk / "s", sharing_disk / "new")
    assert content(sharing_disk / "new") == before
    assert "checksums.npy" not in names(sharing_disk / "new")
    with hashemb.open(sharing_disk / "new", "r+") as table:
        train(table, 1)
    assert content(sharing_disk / "s") == before
    assert verify(sharing_disk / "new") == verify(sharing_disk / "s") == []
    with open(sharing_disk / "s" / "weight.npy", "r+b") as file:
        os.pwrite(file.fileno(), b"x", 4096 + 3)
    with pytest.raises(errors.CorruptTableError, match=r"weight\.npy"):
        restore(sharing_disk / "s", sharing_disk / "again")
    assert not list(sharing_disk.glob("*again*"))


def test_cloning_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second file cannot be cloned, neither clone is kept, and both files are copied."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "target").mkdir()
    calls = []

    def ioctl(fd: int, request: int, source: int) -> None:
        calls.append(request)
        if len(calls) == 2:
            raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(_building.fcntl, "ioctl", ioctl)
    with _directory.Directory(str(tmp_path)) as source, _directory.Directory(str(tmp_path / "target")) as target:
        assert _building.clone_files(source, target, ["a", "b"]) is False
    assert names(tmp_path / "target") == []
    assert calls == [0x40049409] * 2
