"""A replica that follows a directory, in whatever order files arrive and whenever it is stopped."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from delta_chains import EVERY_KEY, OPTIONS, assert_same, chain, contents, train

import hashemb
from hashemb.cli import main
from hashemb.errors import DeltaError

COUNT = 6


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """Make a source with deltas 0 to 5 in `made`, and an empty directory `inbox`."""
    for name in ("made", "inbox"):
        (tmp_path / name).mkdir()
    with hashemb.create(tmp_path / "s", **OPTIONS, optimizer=hashemb.Adagrad(lr=0.1, weight_decay=0.5)) as table:
        chain(table, tmp_path / "made", COUNT)
        yield table


def send(tmp_path: Path, *numbers: int) -> None:
    for number in numbers:
        shutil.copy(tmp_path / "made" / f"{number}.delta", tmp_path / "inbox")


def follow(tmp_path: Path, **options: Any) -> hashemb.FollowStatus:
    return hashemb.follow(tmp_path / "r", tmp_path / "inbox", **options)


def numbers(status: hashemb.FollowStatus) -> list[int]:
    return [info.sequence for info in status.applied]


def test_from_nothing_to_the_end(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    """The replica is made from the base, keeps no state, and its look-ups equal those of the source."""
    send(tmp_path, *range(COUNT))
    seen: list[int] = []
    status = follow(tmp_path, on_applied=lambda info: seen.append(info.sequence))
    assert seen == numbers(status) == list(range(COUNT))
    assert (status.sequence, status.step, status.pending, status.lag_s, status.gap) == (5, source.step, 0, 0.0, None)
    assert status.skipped == {}
    with hashemb.open(tmp_path / "r") as replica:
        assert replica.optimizer == hashemb.SGD(lr=0.1, weight_decay=0.5)
        np.testing.assert_array_equal(replica.lookup(EVERY_KEY), source.lookup(EVERY_KEY))
    assert hashemb.info(tmp_path / "r").clean


def test_nothing_to_do_touches_nothing(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    send(tmp_path, 0, 1)
    follow(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "r").iterdir()}
    for _ in range(3):
        assert follow(tmp_path).applied == ()
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "r").iterdir()} == before


def test_an_empty_directory_and_none(tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    status = follow(tmp_path)
    assert status == hashemb.FollowStatus((), None, None, 0, 0.0, None, {})
    assert not (tmp_path / "r").exists()
    with pytest.raises(FileNotFoundError):
        hashemb.follow(tmp_path / "r", tmp_path / "gone")


def test_arrival_out_of_order(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    for arrival, applied, sequence, pending, gap in [
        (2, [], None, 1, 1),
        (1, [], None, 2, 0),
        (0, [0, 1, 2], 2, 0, None),
        (5, [], 2, 1, 4),
        (4, [], 2, 2, 3),
        (3, [3, 4, 5], 5, 0, None),
    ]:
        send(tmp_path, arrival)
        status = follow(tmp_path)
        assert (numbers(status), status.sequence, status.pending, status.gap) == (applied, sequence, pending, gap)
        assert (status.lag_s > 0) == (pending > 0)


def test_names_do_not_matter_and_applied_files_may_go(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    for number in range(3):
        shutil.copy(tmp_path / "made" / f"{number}.delta", tmp_path / "inbox" / f"{9 - number}.delta")
    assert numbers(follow(tmp_path)) == [0, 1, 2]
    for file in (tmp_path / "inbox").iterdir():
        file.unlink()
    assert follow(tmp_path).sequence == 2
    send(tmp_path, 3)
    assert numbers(follow(tmp_path)) == [3]


def test_half_copied_files_wait(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    """Files may be truncated anywhere or have full size with zeros for the rest; temporary names are ignored."""
    send(tmp_path, 0)
    whole = (tmp_path / "made" / "1.delta").read_bytes()
    target = tmp_path / "inbox" / "1.delta"
    (tmp_path / "inbox" / ".2.delta.tmp").write_bytes(whole)
    (tmp_path / "inbox" / ".2.delta").write_bytes(whole[:100])
    (tmp_path / "inbox" / "notes.txt").write_bytes(b"")
    (tmp_path / "inbox" / "directory.delta").mkdir()
    for size in (0, 10, 4096, 9000, len(whole) // 2):
        for padding in (b"", bytes(len(whole) - size)):
            assert whole[:size] + padding != whole
            target.write_bytes(whole[:size] + padding)
            status = follow(tmp_path)
            assert (status.sequence, list(status.skipped)) == (0, ["1.delta"])
            assert "expected" in status.skipped["1.delta"]
    target.write_bytes(whole)
    status = follow(tmp_path)
    assert (numbers(status), status.skipped) == ([1], {})


def test_what_is_no_regular_file_is_told(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    send(tmp_path, 0)
    os.mkfifo(tmp_path / "inbox" / "pipe.delta")
    status = follow(tmp_path)
    assert (numbers(status), list(status.skipped)) == ([0], ["pipe.delta"])
    assert "expected a regular file, found a FIFO" in status.skipped["pipe.delta"]


def test_lag_is_the_age_of_the_oldest_delta_that_waits(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    send(tmp_path, 0, 3, 5)
    status = follow(tmp_path)
    created = hashemb.delta_info(tmp_path / "made" / "3.delta").created
    assert (status.sequence, status.pending, status.gap) == (0, 2, 2)
    assert 0 <= time.time() - created - status.lag_s < 5
    assert status.lag_s > time.time() - hashemb.delta_info(tmp_path / "made" / "5.delta").created


def test_a_later_base_for_new_replicas(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    """A replica before the base continues with the deltas, and a new one starts at the base; neither is disturbed."""
    send(tmp_path, 0, 1)
    follow(tmp_path)
    source.export_delta(None, tmp_path / "inbox" / "base.delta")
    status = follow(tmp_path)
    assert (status.sequence, status.pending, status.lag_s, status.gap) == (1, 0, 0.0, None)
    for number in (0, 1):
        (tmp_path / "inbox" / f"{number}.delta").unlink()
    status = hashemb.follow(tmp_path / "new", tmp_path / "inbox")
    assert numbers(status) == [6]
    train(source, 50)
    source.export_delta(tmp_path / "inbox" / "base.delta", tmp_path / "inbox" / "7.delta")
    assert numbers(hashemb.follow(tmp_path / "new", tmp_path / "inbox")) == [7]
    status = follow(tmp_path)
    assert (status.sequence, status.pending, status.gap) == (1, 1, 6)


def test_the_way_that_leads_furthest(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    """Two deltas start from the same point, and only one of them has a successor."""
    send(tmp_path, 0, 1)
    source.export_delta(tmp_path / "made" / "0.delta", tmp_path / "inbox" / "jump.delta")  # number 6, contains 1 to 5
    train(source, 50)
    source.export_delta(tmp_path / "inbox" / "jump.delta", tmp_path / "inbox" / "7.delta")
    assert numbers(follow(tmp_path)) == [0, 6, 7]
    with hashemb.open(tmp_path / "r") as replica:
        assert_same(contents(replica, state=False), contents(source, state=False))


def test_with_state_and_half_precision(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "half").mkdir()
    source.export_delta(None, tmp_path / "full" / "0.delta", state=True)
    source.export_delta(None, tmp_path / "half" / "0.delta", dtype="float16")
    hashemb.follow(tmp_path / "full.emb", tmp_path / "full")
    hashemb.follow(tmp_path / "half.emb", tmp_path / "half")
    with hashemb.open(tmp_path / "full.emb") as full, hashemb.open(tmp_path / "half.emb") as half:
        assert full.optimizer == source.optimizer
        assert_same(contents(full), contents(source))
        assert (half.dtype, list(half.state)) == ("float16", ["paid"])
        np.testing.assert_allclose(half.lookup(EVERY_KEY), source.lookup(EVERY_KEY), rtol=2**-10, atol=1e-7)


def test_on_a_copy_of_a_snapshot(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    source.snapshot(tmp_path / "r")
    train(source, 50)
    source.export_delta(tmp_path / "r", tmp_path / "inbox" / "x.delta")
    assert numbers(follow(tmp_path)) == [7]


def test_several_tables_in_one_directory(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    send(tmp_path, 0)
    with hashemb.create(tmp_path / "other", **OPTIONS) as other:
        info = other.export_delta(None, tmp_path / "inbox" / "other.delta")
    with pytest.raises(DeltaError, match="of which of 2 tables"):
        follow(tmp_path)
    (tmp_path / "inbox" / "other.delta").rename(tmp_path / "aside")
    assert numbers(follow(tmp_path)) == [0]
    (tmp_path / "aside").rename(tmp_path / "inbox" / "other.delta")
    status = follow(tmp_path)
    assert (status.pending, list(status.skipped)) == (0, ["other.delta"])
    assert f"of table {info.table.id}" in status.skipped["other.delta"]


def test_a_replica_that_was_trained_is_an_error(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    send(tmp_path, 0)
    follow(tmp_path)
    with hashemb.open(tmp_path / "r", "r+") as replica:
        replica.update([1], np.ones((1, 5), np.float32))
    assert follow(tmp_path).pending == 0
    send(tmp_path, 1)
    with pytest.raises(DeltaError, match="updated since") as caught:
        follow(tmp_path)
    assert caught.value.reason == "trained"


@pytest.mark.parametrize("point", ["_write_rows", "_take_counters", "_reserve"])
def test_killed_and_started_again(tmp_path: Path, source: hashemb.EmbeddingTable, point: str) -> None:
    """It is killed in the middle of the second delta; another delta may have arrived by the restart."""
    send(tmp_path, 0, 1)
    code = f"""
import os, signal, sys, hashemb, hashemb._points.delta
calls, real = [], hashemb._points.delta.{point}
def killing(*args):
    calls.append(1)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
hashemb._points.delta.{point} = killing
hashemb.follow(sys.argv[1], sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "r", tmp_path / "inbox"], timeout=60)
    assert done.returncode == -signal.SIGKILL
    send(tmp_path, 2)
    if point != "_reserve":
        (tmp_path / "inbox" / "1.delta").rename(tmp_path / "aside")
        with pytest.raises(DeltaError, match="not in the directory"):
            follow(tmp_path)
        (tmp_path / "aside").rename(tmp_path / "inbox" / "1.delta")
    assert numbers(follow(tmp_path)) == [1, 2]


def test_two_followers_of_one_replica(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    """Each delta is applied by one of the followers, and neither fails."""
    send(tmp_path, *range(COUNT))
    code = "import sys, hashemb; print(len(hashemb.follow(sys.argv[1], sys.argv[2]).applied))"
    command = [sys.executable, "-c", code, str(tmp_path / "r"), str(tmp_path / "inbox")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert sum(int(out) for out, _ in results) == COUNT
    with hashemb.open(tmp_path / "r") as replica:
        assert_same(contents(replica, state=False), contents(source, state=False))


def test_readers_see_it_without_reopening(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    send(tmp_path, 0)
    follow(tmp_path)
    with hashemb.open(tmp_path / "r") as reader:
        send(tmp_path, *range(1, COUNT))
        follow(tmp_path)
        np.testing.assert_array_equal(reader.lookup(EVERY_KEY), source.lookup(EVERY_KEY))
        assert reader.step == source.step


# ---- the command line ----


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """snapshot, delta and follow work on the directory of a table; a second follow prints only its position."""
    pytest.importorskip("typer")

    def hashemb_command(*arguments: Any) -> Any:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    (tmp_path / "inbox").mkdir()
    with hashemb.create(tmp_path / "s", **OPTIONS) as table:
        train(table, 0)
    done = hashemb_command("delta", tmp_path / "s", "--output", tmp_path / "inbox" / "0.delta", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("delta number 0, step 3: ")
    done = hashemb_command("snapshot", tmp_path / "s", tmp_path / "copy")
    assert done.stdout.startswith("snapshot number 1, step 3: ")
    with hashemb.open(tmp_path / "s", "r+") as table:
        train(table, 1)
    first = tmp_path / "inbox" / "0.delta"
    target = tmp_path / "inbox" / "2.delta"
    done = hashemb_command("delta", tmp_path / "s", "--since", first, "-o", target, "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    done = hashemb_command("follow", tmp_path / "inbox", tmp_path / "r", "--once")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["applied number 0", "applied number 2", "at number 2, step 6"]
    assert lines[2].endswith("0 pending, lag 0.0 s")
    assert hashemb.info(tmp_path / "r").dtype == "float16"
    done = hashemb_command("follow", tmp_path / "inbox", tmp_path / "r", "--once")
    assert done.stdout == "at number 2, step 6: 0 pending, lag 0.0 s\n"
    done = hashemb_command("delta", tmp_path / "s", "--since", tmp_path / "gone", "-o", tmp_path / "x.delta")
    assert done.returncode == 1
    assert done.stderr.endswith("gone: No such file or directory\n")


def test_follow_ends_with_ctrl_c(tmp_path: Path, source: hashemb.EmbeddingTable) -> None:
    """It prints one line per delta and per problem while it runs, and exits with status 0."""
    pytest.importorskip("typer")
    send(tmp_path, 0)
    arguments = ["follow", str(tmp_path / "inbox"), str(tmp_path / "r"), "--interval", "0.05"]
    command = [sys.executable, "-m", "hashemb", *arguments]
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=default) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(2)]
        send(tmp_path, 2)
        lines.append(process.stdout.readline())
        os.kill(process.pid, signal.SIGINT)
        lines += process.stdout.readlines()
        assert process.wait(30) == 0
    assert lines[0].startswith("applied number 0: step 3, ")
    assert lines[1].startswith("at number 0, step 3")
    assert lines[2] == "number 1 is missing\n"
    assert len(lines) == 3
