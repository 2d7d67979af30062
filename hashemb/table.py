"""EmbeddingTable: checks arguments, calls the core. No arithmetic here, and no files: see csrc/ and _files/."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hashemb import _arguments as arguments
from hashemb import _core
from hashemb._binding import bind_core
from hashemb._files import SnapshotInfo, TableFiles
from hashemb._files import blocks as _blocks
from hashemb._files import directory as _directory
from hashemb._points import DeltaInfo, DeltaReader, Since, apply_to, export_to, take_snapshot
from hashemb.errors import ClosedTableError, ReadOnlyTableError
from hashemb.stats import TableStats, collision_rate, estimate_distinct_keys

__all__ = ["EmbeddingTable"]

Mode = Literal["r", "r+"]
Isolation = Literal["hogwild", "exact"]
Floats = npt.NDArray[np.float32]


class EmbeddingTable:
    """A table of vectors in memory-mapped files. Made by `hashemb.create` and `hashemb.open`, not directly.

    Any number of processes may have the same table open, and any number of threads may use one object: look-ups
    run freely, updates of one object are applied one after another. A context manager: closes at the end.

    Attributes
    ----------
    path : str
    mode : {"r", "r+"}
    num_embeddings, embedding_dim, num_hashes, seed : int
    dtype : str
    optimizer, init
        As given to `create`.
    isolation : {"hogwild", "exact"}
        As given to `open`.
    recovered : {None, "killed", "rebooted"}
        How the table was found, if its last writer did not close it: ended by a signal (all it wrote is there), or by
        a restart of the machine (what was not flushed may be lost). Only of a table opened for writing by nobody else.
    suspects : ndarray of int64
        With `recovered`, the rows that killed processes were writing, at most one for each of their threads: elements
        or optimiser state from before and after an update may stand side by side in them, and in no other row.
    """

    def __init__(
        self, path: str, mode: Mode, *, isolation: Isolation = "hogwild", huge_pages: bool | None = None
    ) -> None:
        files = TableFiles(path, writable=mode == "r+", huge_pages=huge_pages)
        meta = files.meta
        self.path, self.mode, self.isolation = path, mode, isolation
        self.recovered, self.suspects = files.recovered, files.suspects
        self.num_embeddings, self.embedding_dim = meta.num_embeddings, meta.embedding_dim
        self.num_hashes, self.seed, self.dtype = meta.num_hashes, meta.seed, meta.dtype
        self.optimizer, self.init = meta.optimizer, meta.init
        self._meta = meta
        self._files: TableFiles | None = files
        self._core: _core.Core | None = bind_core(files)
        self._finalizer = weakref.finalize(self, files.close)
        if files.recovered == "rebooted":
            warnings.warn(
                f"{path} was not closed cleanly before the machine restarted: updates since its last flush may "
                "be lost or incomplete",
                RuntimeWarning,
                stacklevel=3,
            )

    # -- reading --

    def lookup(
        self,
        keys: Any,
        *,
        offsets: Any = None,
        pooling: str = "sum",
        per_sample_weights: Any = None,
        out: Floats | None = None,
    ) -> Floats:
        """Vectors of keys, or pooled vectors of bags of keys.

        Parameters
        ----------
        keys : array_like of int, any shape and integer dtype; or scipy.sparse CSR matrix
            Negative keys are their two's complement. Of a CSR matrix the column indices are keys, the data
            weights and the rows bags. Other values: `hashemb.hash_keys` first.
        offsets : array_like of int, shape (num_bags + 1,), optional
            Bag b is ``keys[offsets[b]:offsets[b + 1]]``; starts at 0, ends at ``len(keys)``.
        pooling : {"sum", "mean", "sqrtn"}
            "mean" divides a bag's weighted sum by its total weight, "sqrtn" by the root of its total squared
            weight (as TensorFlow's ``embedding_lookup_sparse``). An empty bag, and one whose divisor is 0, is 0.
        per_sample_weights : array_like of float, shape (num_keys,), optional
        out : ndarray of float32, C-contiguous, optional
            Receives the result.

        Returns
        -------
        ndarray of float32
            ``keys.shape + (embedding_dim,)``, or ``(num_bags, embedding_dim)``.

        Raises
        ------
        TypeError, ValueError
            For arguments of the wrong kind or shape, with the numbers.
        NoSpaceError
            On a full tmpfs only, where reading a row never written takes a page; with space the same call succeeds.
        ClosedTableError

        Notes
        -----
        Reads ``num_hashes * embedding_dim * itemsize`` bytes per key; writes nothing to the table. Safe beside
        writers in any thread or process; a row read during its update may mix old and new elements.
        """
        core = self._open_core()
        keys, offsets, weights, code, shape = arguments.batch(
            keys, offsets, pooling, per_sample_weights, self.embedding_dim
        )
        result = arguments.output_array(out, shape)
        core.lookup(keys, result, offsets, weights, code)
        return result

    def rows(self, keys: Any) -> npt.NDArray[np.int64]:
        """Rows of keys, int64 of shape ``keys.shape``; with num_hashes k > 1, ``keys.shape + (k,)``."""
        core = self._open_core()
        array = arguments.keys_array(keys)
        shape = array.shape if self.num_hashes == 1 else (*array.shape, self.num_hashes)
        result = np.empty(shape, np.int64)
        core.rows(array, result)
        return result

    def prefetch(self, keys: Any) -> None:
        """Starts to bring rows into memory, and returns at once: for the next batch, before work on this one.

        Parameters
        ----------
        keys : array_like of int, any shape and integer dtype
            As for `lookup`.

        Raises
        ------
        TypeError, ClosedTableError

        Notes
        -----
        For a table larger than memory; where the rows are in memory already it changes nothing. Of a table open for
        writing it brings the optimiser's state as well. A thread of this process asks the kernel for the pages
        (`MADV_WILLNEED`): advice, which the kernel may ignore when memory is short, as this does when 64 earlier calls
        still wait for the disk. Writes nothing. Reads a page (4 KiB) per distinct row and file. Look-ups and updates
        ask for their own pages without this (docs/performance.md). In a table with huge
        pages, what this reads stays small.

        Examples
        --------
        >>> import hashemb, tempfile
        >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=1000, embedding_dim=4)
        >>> batches = [[1, 2, 3], [4, 5, 6]]
        >>> for batch, following in zip(batches, [*batches[1:], []]):
        ...     table.prefetch(following)
        ...     vectors = table.lookup(batch)
        >>> table.close()
        """
        self._open_core().prefetch(arguments.keys_array(keys), self.mode == "r+")

    # -- writing --

    def update(
        self,
        keys: Any,
        grads: Any,
        *,
        offsets: Any = None,
        pooling: str = "sum",
        per_sample_weights: Any = None,
    ) -> None:
        """Applies one optimiser step.

        Parameters
        ----------
        keys, offsets, pooling, per_sample_weights
            As for the `lookup` whose result was used.
        grads : array_like of float
            Gradient of the loss by that result, of its shape.

        Raises
        ------
        ValueError
            Wrong shapes, NaN or infinite gradients; nothing has been written.
        ReadOnlyTableError, ClosedTableError
        NoSpaceError
            The file system is full; nothing has been written, and the same call may be made again.
        TableBusyError
            Called by a signal handler or callback in the middle of `apply_delta` to the same table by the same thread.

        Notes
        -----
        A signal handler runs before or after the batch is applied, never amid it, and may use the table or raise.
        Another thread must not change `grads` meanwhile: what becomes NaN or infinite does not reach the table, and a
        `ValueError` says how many rows were left as they were.

        Gradients of the same row (the same key, or colliding ones) are summed in batch order, then each row is
        stepped once. Reads and writes each distinct row and its state once. Bits do not depend on the number of
        threads. Counts as one step also when `keys` is empty.
        """
        core, files = self._writable()
        keys, offsets, weights, code, shape = arguments.batch(
            keys, offsets, pooling, per_sample_weights, self.embedding_dim
        )
        grads = arguments.float_array("grads", grads, shape)
        plan = core.plan(keys, grads, offsets, weights, code)
        target = files.target
        need = core.apply(plan, self.isolation == "exact", target.saving if target else None)
        if need:
            files.apply(core, plan, need, exact=self.isolation == "exact")
        if files.target is not None or plan.num_fresh:
            files.after_batch(plan.fresh_blocks)

    @property
    def lr(self) -> float:
        """The learning rate, of every process that has the table open. FTRL: its alpha."""
        return float(self._open_files().control["lr"][0])

    @lr.setter
    def lr(self, value: float) -> None:
        _, files = self._writable()
        files.control["lr"] = arguments.learning_rate(value, self.optimizer)

    # -- looking inside --

    @property
    def weight(self) -> npt.NDArray[Any]:
        """Read-only view of the storage, (num_embeddings, embedding_dim); bfloat16 as uint16.

        Raw: rows never written are zero here, and weight decay that a row still owes is not applied.
        """
        return _read_only(self._open_files().arrays["weight"])

    @property
    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Read-only views of the optimiser's arrays, by name."""
        arrays = self._open_files().arrays
        return {name: _read_only(arrays[name]) for name in self._meta.row_files if name != "weight"}

    @property
    def step(self) -> int:
        """Updates applied so far, by all processes."""
        return int(self._open_files().control["step"][0])

    def stats(self, exact: bool = False) -> TableStats:
        """How full the table is; with `exact`, rows are counted by reading every block ever written."""
        files = self._open_files()
        with files.calls:
            touched = self._count_rows(files) if exact else int(files.control["rows_touched"][0])
            disk_bytes = _directory.disk_bytes(files.directory)
            resident_bytes, huge_page_bytes = files.resident_bytes(), files.huge_page_bytes()
        touched = min(touched, self.num_embeddings)
        distinct = estimate_distinct_keys(touched, self.num_embeddings, self.num_hashes)
        return TableStats(
            num_embeddings=self.num_embeddings,
            rows_touched=touched,
            exact=exact,
            estimated_distinct_keys=distinct,
            collision_rate=collision_rate(distinct, self.num_embeddings, self.num_hashes),
            logical_bytes=self._meta.logical_bytes,
            disk_bytes=disk_bytes,
            resident_bytes=resident_bytes,
            huge_page_bytes=huge_page_bytes,
        )

    def _count_rows(self, files: TableFiles) -> int:
        rows, count = self._meta.block_rows, 0
        weight = files.arrays["weight"].view(np.uint16 if self._meta.dtype != "float32" else np.uint32)
        for first, epochs in _blocks.epoch_chunks(files.fd("blocks"), self._meta.num_blocks):
            files.calls.check()
            for block in (first + np.flatnonzero(epochs)).tolist():
                count += int(weight[block * rows : (block + 1) * rows].any(axis=1).sum())
        return count

    # -- points in time --

    def snapshot(
        self,
        dst: str | os.PathLike[str],
        *,
        extra: dict[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SnapshotInfo:
        """Copies the table as it is at one point in time, while writers in any process go on.

        Parameters
        ----------
        dst : str or path-like
            Directory to create: a table like any other, with check sums (`hashemb.verify`).
        extra : dict, optional
            JSON to keep with it, say the trainer's position in its data: `hashemb.info(dst).snapshot.extra`.
        progress : callable, optional
            Called with blocks saved so far and in all.

        Returns
        -------
        SnapshotInfo

        Raises
        ------
        FileExistsError, FileNotFoundError
            There is something at `dst`, or its parent does not exist.
        NoSpaceError, OSError
            It could not be written, by this process or by a writer that had to save a block; nothing is left at `dst`.
        ReadOnlyTableError, ClosedTableError; HashembError where all 2**32 - 1 epochs are used up

        Notes
        -----
        The point in time is between batches: it waits for those in flight, and holds up the next ones for some
        microseconds. From then on whoever is about to change a row first saves what it was, and this call copies all
        written blocks, puts those rows right, and syncs. One snapshot or delta is taken of a table at a time; a
        second call waits.
        """
        _, files = self._writable()
        return take_snapshot(files, arguments.path_string(dst, "dst"), extra=extra, progress=progress)

    def export_delta(
        self,
        since: Since,
        path: str | os.PathLike[str],
        *,
        state: bool = False,
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DeltaInfo:
        """Writes what changed since a point in time to one file, for `hashemb.apply_delta`; writers go on meanwhile.

        Parameters
        ----------
        since : None, str, path-like, SnapshotInfo or DeltaInfo
            A snapshot or delta in this table's history, or the path of one. None: everything, to begin a chain.
        path : str or path-like
            File to create; by custom ``*.delta``, which `hashemb.follow` looks for.
        state : bool
            The optimiser's state too, to train on with. Default: what look-ups need.
        dtype : {"float32", "float16", "bfloat16"}, optional
            Of the weights in the file, rounded to nearest even. Default: the table's.
        progress : callable, optional
            Called with blocks packed so far and in all.

        Returns
        -------
        DeltaInfo

        Raises
        ------
        ValueError
            `since` is not in the table's history, `state` with another dtype, or a weight too large for `dtype`.
        FileExistsError, FileNotFoundError
            There is something at `path`, or its directory does not exist.
        NoSpaceError, OSError
            It could not be written; nothing is left at `path`.
        DeltaError
            The table itself has a delta applied in part.
        ReadOnlyTableError, ClosedTableError; HashembError as for `snapshot`

        Notes
        -----
        A point in time, as `snapshot`: no batch is half in it. Holds whole blocks, about 4096 bytes of weights each;
        reads and writes each twice, through files beside `path`. The file appears complete and synced, or not at all.
        """
        _, files = self._writable()
        return export_to(files, since, arguments.path_string(path), state=state, dtype=dtype, progress=progress)

    def _apply_delta(self, delta: DeltaReader, progress: Callable[[int, int], None] | None = None) -> DeltaInfo:
        """See `hashemb.apply_delta`; the delta has been checked."""
        _, files = self._writable()
        return apply_to(files, delta, progress)

    # -- life --

    def flush(self) -> None:
        """Returns when everything written so far is on disk: the durability point. Costs what is unwritten."""
        files = self._open_files()
        with files.calls:
            files.flush()

    def close(self) -> None:
        """Closes the table; again is no error.

        Calls in other threads end first: updates and look-ups with their result, longer ones with `ClosedTableError`.
        Arrays from `weight` and `state` stay valid.

        Raises
        ------
        TableBusyError
            Called by a signal handler or callback, in the middle of another call of the same thread.
        """
        files = self._files
        if files is None:
            return
        try:
            files.close()
        finally:
            if files.calls.closed:
                self._core = self._files = None
                self._finalizer.detach()

    def __enter__(self) -> EmbeddingTable:
        self._open_files()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._files is None else f"step={self.step}, lr={self.lr:g}"
        return (
            f"<hashemb.EmbeddingTable {self.path!r}: {self.num_embeddings} x {self.embedding_dim} {self.dtype}, "
            f"{self.optimizer}, {self.init}, num_hashes={self.num_hashes}, seed={self.seed}, "
            f"mode={self.mode!r}, isolation={self.isolation!r}, {state}>"
        )

    # -- internals --

    def _open_core(self) -> _core.Core:
        if self._core is None:
            raise ClosedTableError(f"{self.path} has been closed")
        return self._core

    def _open_files(self) -> TableFiles:
        if self._files is None:
            raise ClosedTableError(f"{self.path} has been closed")
        return self._files

    def _writable(self) -> tuple[_core.Core, TableFiles]:
        core, files = self._core, self._files
        if core is None or files is None:
            raise ClosedTableError(f"{self.path} has been closed")
        if self.mode == "r":
            raise ReadOnlyTableError(f'{self.path} is open read-only; open it with mode="r+"')
        return core, files


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
