"""The scenarios of the fault sweep: operations on a table, their initial states, and the checks after them."""

from __future__ import annotations

import ctypes
import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np

import hashemb
from hashemb import _core
from hashemb._files.directory import read_history
from hashemb.errors import DeltaError, HashembError

OPTIONS: dict[str, Any] = {
    "num_embeddings": 3000,
    "embedding_dim": 4,
    "optimizer": hashemb.Adagrad(lr=0.1, weight_decay=0.01),
    "seed": 3,
}
OLD, NEW = np.arange(12), np.arange(8, 30)
GRADS = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
ALL = np.arange(40)

shim = ctypes.CDLL(None)


def reference_vectors(*updates: tuple[Any, Any]) -> Any:
    """Return the contents of the slow twin after these updates."""
    table = hashemb.reference.ReferenceTable(**OPTIONS)
    for keys, grads in updates:
        table.update(keys, grads)
    return table.lookup(ALL)


FIRST, SECOND = (OLD, GRADS[: OLD.size]), (NEW, GRADS[: NEW.size])
AFTER = [reference_vectors(*updates) for updates in ((), (FIRST,), (FIRST, SECOND), (FIRST, SECOND, SECOND))]


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found, expected)


# ---- scenarios ----


class Scenario:
    """One operation. `self.root` has a copy of the template, a closed table `t` after the first update."""

    updates = 1  # number of updates (see AFTER) before `act`

    def __init__(self, root: Path) -> None:
        self.root, self.table = root, None
        self.dead = False  # whether the removal of unfinished files was made to fail too
        self.lasting = False  # whether later calls failed as well

    def prepare(self) -> None:
        self.table = hashemb.open(self.root / "t", "r+")

    def act(self) -> None:
        raise NotImplementedError

    def check_failed(self) -> None:
        """Check, after an error, that nothing has changed."""
        same(self.table.lookup(ALL), AFTER[self.updates])
        assert self.table.step == self.updates

    def check_done(self) -> None:
        """Check the table after `act` has succeeded, at once or on the second attempt."""
        same(self.table.lookup(ALL), AFTER[self.updates])

    def again(self) -> None:
        self.act()

    def finish(self) -> None:
        """Check that the table can be closed and is intact when reopened."""
        if self.table is not None:
            expected = self.table.lookup(ALL)
            self.table.close()
            with hashemb.open(self.table.path, "r+") as table:
                same(table.lookup(ALL), expected)
                assert table.recovered is None, table.recovered
            assert hashemb.info(self.table.path).clean


class Create(Scenario):
    def prepare(self) -> None:
        pass

    def act(self) -> None:
        options = {**OPTIONS, "num_embeddings": 2**18}  # files above 2 MiB are mapped differently
        self.table = hashemb.create(self.root / "new", **options)

    def check_failed(self) -> None:
        """Check that nothing is left, unless the clean-up was made to fail as well."""
        if (self.root / "new").exists():
            assert self.lasting, "made, but then it could not be opened, and it was not removed"
            hashemb.open(self.root / "new").close()
            shutil.rmtree(self.root / "new")

    def check_done(self) -> None:
        assert self.table.step == 0
        self.table.update(*FIRST)

    def finish(self) -> None:
        self.table.close()
        with hashemb.open(self.root / "new") as table:
            assert table.step == 1
        assert hashemb.info(self.root / "new").clean


class OpenToRead(Scenario):
    mode: Any = "r"

    def prepare(self) -> None:
        pass

    def act(self) -> None:
        self.table = hashemb.open(self.root / "t", self.mode)

    def check_failed(self) -> None:
        assert self.table is None
        assert hashemb.info(self.root / "t").step == 1


class OpenToWrite(OpenToRead):
    mode = "r+"


class FirstUpdate(Scenario):
    """The first update of rows whose blocks have no disk space yet."""

    def act(self) -> None:
        self.table.update(*SECOND)

    def check_done(self) -> None:
        same(self.table.lookup(ALL), AFTER[2])
        assert self.table.step == 2


class FirstUpdateByFallocate(FirstUpdate):
    """The same on a kernel that cannot populate pages."""

    def prepare(self) -> None:
        super().prepare()
        self.table._core.asks_for_room = True
        _core.populate_blocks = lambda *args: errno.EINVAL


class SteadyUpdate(Scenario):
    updates, isolation = 2, "hogwild"

    def prepare(self) -> None:
        self.table = hashemb.open(self.root / "t", "r+", isolation=self.isolation)
        self.table.update(*SECOND)

    def act(self) -> None:
        self.table.update(*SECOND)

    def check_done(self) -> None:
        same(self.table.lookup(ALL), AFTER[3])
        assert self.table.step == 3


class ExactUpdate(SteadyUpdate):
    isolation = "exact"


class Flush(Scenario):
    updates = 2

    def prepare(self) -> None:
        super().prepare()
        self.table.update(*SECOND)

    def act(self) -> None:
        self.table.flush()


class Rate(Scenario):
    def act(self) -> None:
        self.table.lr = 0.5

    def check_done(self) -> None:
        assert self.table.lr == 0.5


class Close(Flush):
    """A failing close still releases the table, which is then not marked clean."""

    def act(self) -> None:
        self.table.close()

    def check_failed(self) -> None:
        with hashemb.open(self.root / "t", "r+") as table:
            assert table.recovered in (None, "killed")
            same(table.lookup(ALL), AFTER[2])

    def check_done(self) -> None:
        with hashemb.open(self.root / "t") as table:
            same(table.lookup(ALL), AFTER[2])

    def finish(self) -> None:
        assert hashemb.info(self.root / "t").clean


class Snapshot(Scenario):
    def act(self) -> None:
        self.table.snapshot(self.root / "s", extra={"position": 7})

    def check_failed(self) -> None:
        self.check_absent()
        super().check_failed()

    def check_absent(self) -> None:
        """Check that the snapshot is absent, or complete if even the clean-up has failed."""
        if self.dead and (self.root / "s").exists():
            hashemb.open(self.root / "s").close()
            shutil.rmtree(self.root / "s")
        assert not (self.root / "s").exists()

    def check_done(self) -> None:
        super().check_done()
        assert hashemb.info(self.root / "s").snapshot.extra == {"position": 7}
        with hashemb.open(self.root / "s") as copy:
            same(copy.lookup(ALL), AFTER[1])
            for name, state in self.table.state.items():
                same(copy.state[name], state)
        self.table.update(*SECOND)


class ExportDelta(Scenario):
    updates, name = 2, "d.delta"

    def prepare(self) -> None:
        super().prepare()
        self.table.snapshot(self.root / "base")
        self.table.update(*SECOND)

    def act(self) -> None:
        self.table.export_delta(self.root / "base", self.root / self.name, state=True)

    def check_failed(self) -> None:
        """Check that the file is absent, or complete if even the clean-up has failed."""
        if self.dead:
            (self.root / self.name).unlink(missing_ok=True)
        assert not (self.root / self.name).exists()
        super().check_failed()

    def check_done(self) -> None:
        super().check_done()
        with hashemb.open(self.root / "base", "r+") as replica:
            hashemb.apply_delta(replica, self.root / self.name)
            same(replica.lookup(ALL), AFTER[2])
            for name, state in self.table.state.items():
                same(replica.state[name], state)


class ApplyDelta(ExportDelta):
    """Apply a delta to a replica. After a fault it is unchanged, or reports a partial delta and accepts it again."""

    def prepare(self) -> None:
        super().prepare()
        super().act()
        self.table.close()
        self.table = hashemb.open(self.root / "base", "r+")

    def act(self) -> None:
        hashemb.apply_delta(self.table, self.root / self.name)

    def check_failed(self) -> None:
        found = self.table.lookup(ALL)
        if read_history(self.table.path).applying is None and self.table.step == 1:
            same(found, AFTER[1])

    def again(self) -> None:
        try:
            self.act()
        except DeltaError as error:
            if error.reason != "applied":  # it was applied completely before the fault
                raise

    def check_done(self) -> None:
        same(self.table.lookup(ALL), AFTER[2])
        assert self.table.step == 2


class Restore(Scenario):
    """Replace a table by an earlier snapshot: it is one or the other at any time."""

    def prepare(self) -> None:
        with hashemb.open(self.root / "t", "r+") as table:
            table.snapshot(self.root / "s")
            table.update(*SECOND)

    def act(self) -> None:
        hashemb.restore(self.root / "s", self.root / "t", replace=True)

    def check_failed(self) -> None:
        with hashemb.open(self.root / "t") as table:
            assert any((table.lookup(ALL) == AFTER[n]).all() for n in (1, 2))

    def check_done(self) -> None:
        assert hashemb.verify(self.root / "t") == []
        self.table = hashemb.open(self.root / "t", "r+")
        super().check_done()
        self.table.update(*SECOND)


class SnapshotBesideWriter(Snapshot):
    """A snapshot while a thread adds the same gradient to every row in a loop: in a snapshot all rows are equal."""

    def prepare(self) -> None:
        options = {**OPTIONS, "optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros(), "num_embeddings": 30000}
        self.table = hashemb.create(self.root / "w", **options)
        self.keys = np.arange(3000)
        self.grads = np.ones((self.keys.size, 4), np.float32)
        self.table.update(self.keys[::-1], self.grads)
        self.per_row = self.table.lookup(self.keys)
        self.failed: list[BaseException] = []
        self.writer = hashemb.open(self.root / "w", "r+")
        self.go, self.stop = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self) -> None:
        self.go.wait()
        for _ in range(100_000):
            if self.stop.is_set():
                return
            try:
                self.writer.update(self.keys, self.grads)
            except (OSError, HashembError):
                pass  # faults hit any caller; no part of that batch may be applied
            except BaseException as error:
                self.failed.append(error)

    def act(self) -> None:
        self.go.set()
        self.table.snapshot(self.root / "s")

    def check_failed(self) -> None:
        self.check_absent()

    def check_done(self) -> None:
        self.stop.set()
        self.thread.join()
        self.writer.close()
        assert self.failed == []
        self.check_whole(self.table)
        with hashemb.open(self.root / "s") as copy:
            self.check_whole(copy)

    def check_whole(self, table: Any) -> None:
        """Check that every row contains the same whole number of batches, which is the step of the table."""
        same(table.lookup(self.keys), self.per_row * np.float32(table.step))

    def finish(self) -> None:
        self.table.close()
        with hashemb.open(self.root / "w") as table:
            self.check_whole(table)


class Canary(Scenario):
    """Two operations presented as one, of which a fault leaves half: the sweep has to detect it."""

    def act(self) -> None:
        self.table.update(*SECOND)
        self.table.flush()

    def check_done(self) -> None:
        same(self.table.lookup(ALL), AFTER[2])


# fmt: off
SCENARIOS: dict[str, type[Scenario]] = {
    "create": Create, "open r": OpenToRead, "open r+": OpenToWrite, "first update": FirstUpdate,
    "first update by fallocate": FirstUpdateByFallocate, "update": SteadyUpdate, "exact update": ExactUpdate,
    "flush": Flush, "close": Close, "lr": Rate, "snapshot": Snapshot, "snapshot beside a writer": SnapshotBesideWriter,
    "export": ExportDelta, "apply": ApplyDelta, "restore": Restore, "canary": Canary,
}
# fmt: on
