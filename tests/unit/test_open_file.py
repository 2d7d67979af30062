"""`_open_file.OpenFile` owns its descriptor from the first moment, and never closes another one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hashemb._open_file import OpenFile


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_it_is_closed_by_close_by_with_and_with_the_last_reference(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    file = OpenFile(tmp_path / "f")
    fd = file.fd
    assert os.pread(fd, 9, 0) == b"abc"
    assert not os.get_inheritable(fd)
    file.close()
    file.close()
    assert file.fd == -1
    assert not is_open(fd)
    with OpenFile(tmp_path / "f") as file:
        fd = file.fd
    assert file.fd == -1
    assert not is_open(fd)
    fd = OpenFile(os.fsencode(tmp_path / "f")).fd
    assert not is_open(fd)


def test_flags_mode_and_directory(tmp_path: Path) -> None:
    with OpenFile(tmp_path, os.O_DIRECTORY) as directory:
        with OpenFile("new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, directory) as file:
            assert os.write(file.fd, b"x") == 1
        assert os.stat(tmp_path / "new").st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError, match="new"):
            OpenFile("new", os.O_RDWR | os.O_CREAT | os.O_EXCL, directory=directory)
    with pytest.raises(OSError, match="new") as caught:
        OpenFile("new", directory=directory)
    assert caught.value.errno == errno.EBADF  # it is closed, and is not replaced by the current directory


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_what_cannot_be_opened(tmp_path: Path, flags: int) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        OpenFile(tmp_path / "none", flags)
    assert caught.value.filename == tmp_path / "none"
    with pytest.raises(ValueError, match="null byte"):
        OpenFile(f"{tmp_path}\0", flags)


@pytest.mark.parametrize("argument", ["1.5", "Raising()", "'/', 'no flags'", "'/', 0, 0, 3", "'a\\0b'", "'/nowhere'"])
def test_what_fails_closes_nothing_else(argument: str) -> None:
    """Descriptor 0 would be the value of a number that was never set."""
    script = f"""
import os
from hashemb._open_file import OpenFile
class Raising:
    def __fspath__(self):
        raise KeyboardInterrupt
before = sorted(os.listdir("/proc/self/fd"))
for _ in range(3):
    try:
        OpenFile({argument})
    except BaseException as error:
        print(type(error).__name__)
assert os.fstat(0) and sorted(os.listdir("/proc/self/fd")) == before
"""
    done = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
