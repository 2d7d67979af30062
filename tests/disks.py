"""Small file systems for tests that fill them."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def mounted(kind: str, mib: int, tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of `mib` MiB, and unmount it at the end."""
    target = tmp_path / "disk"
    target.mkdir()
    if kind == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(target)]]
    else:
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, mib << 20)
        commands = [["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(target)]]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip(f"{command[0]} is not installed")
        if done.returncode:
            pytest.skip(f"this user may not mount file systems: {done.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def fill(directory: Path) -> Path:
    """Fill all remaining space; return the file to remove."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return ballast
