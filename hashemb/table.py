"""`EmbeddingTable` checks arguments and calls the core. The arithmetic is in csrc/, file access in _files/."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from hashemb import _arguments as arguments
from hashemb import _core
from hashemb._files import SnapshotInfo, TableFiles, bind_core
from hashemb._points import DeltaInfo, DeltaReader, Since, apply_to, export_to, take_snapshot
from hashemb.errors import ClosedTableError, ReadOnlyTableError
from hashemb.stats import TableStats

__all__ = ["EmbeddingTable"]

Mode = Literal["r", "r+"]
Isolation = Literal["hogwild", "exact"]
Floats = npt.NDArray[np.float32]


class EmbeddingTable:
    """A table of vectors in memory-mapped files, returned by `hashemb.create` and `hashemb.open`.

    Any number of processes may have the same table open, and any number of threads may use one object: look-ups
    run in parallel, and updates through one object are applied in turn. As a context manager, it closes at the end.

    Attributes
    ----------
    path, dtype : str
    mode : {"r", "r+"}
    isolation : {"hogwild", "exact"}
    num_embeddings, embedding_dim, num_hashes, seed : int
    optimizer, init
        The arguments of `create` and `open`.
    recovered : {None, "killed", "rebooted"}
        Why the last writer did not close the table: it was killed (everything it wrote is present) or the machine
        restarted (unflushed updates may be lost). Set only with mode "r+", if no other process has it open for writing.
    suspects : ndarray of int64
        With `recovered`, the rows that killed processes were writing, at most one for each of their threads. These
        rows, and no others, may mix elements or optimiser state from before and after an update.
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
        """Return the vectors of keys, or the pooled vectors of bags of keys.

        Parameters
        ----------
        keys : array_like of int, any shape and integer dtype; or scipy.sparse CSR matrix
            Negative keys are read as their two's complement. In a CSR matrix the column indices are keys, the data
            are weights and the rows are bags. Pass other values through `hashemb.hash_keys` first.
        offsets : array_like of int, shape (num_bags + 1,), optional
            Bag b is ``keys[offsets[b]:offsets[b + 1]]``. The first offset is 0, the last is ``len(keys)``.
        pooling : {"sum", "mean", "sqrtn"}
            "mean" divides a bag's weighted sum by its total weight, "sqrtn" by the square root of its sum of squared
            weights (as TensorFlow's ``embedding_lookup_sparse``). An empty bag, or one whose divisor is 0, gives 0.
        per_sample_weights : array_like of float, shape (num_keys,), optional
        out : ndarray of float32, C-contiguous, optional
            Array that receives the result.

        Returns
        -------
        ndarray of float32
            ``keys.shape + (embedding_dim,)``, or ``(num_bags, embedding_dim)``.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong kind or shape; the message gives the numbers.
        NoSpaceError
            Only on a full tmpfs, where reading a row never written takes a page. The call can be repeated.
        ClosedTableError

        Notes
        -----
        The call reads ``num_hashes * embedding_dim * itemsize`` bytes per key and writes nothing to the table. It may
        run at the same time as writers in any thread or process; a row being updated may mix old and new elements.
        """
        core = self._open_core()
        keys, offsets, weights, code, shape = arguments.batch(
            keys, offsets, pooling, per_sample_weights, self.embedding_dim
        )
        result = arguments.output_array(out, shape)
        core.lookup(keys, result, offsets, weights, code)
        return result

    def rows(self, keys: Any) -> npt.NDArray[np.int64]:
        """Return the rows of keys, int64 of shape ``keys.shape``, or ``keys.shape + (k,)`` with num_hashes k > 1."""
        core, array = self._open_core(), arguments.keys_array(keys)
        result = np.empty(array.shape if self.num_hashes == 1 else (*array.shape, self.num_hashes), np.int64)
        core.rows(array, result)
        return result

    def prefetch(self, keys: Any) -> None:
        """Start to read the rows of the next batch into memory, and return without waiting for them.

        Parameters
        ----------
        keys : array_like of int, any shape and integer dtype
            As for `lookup`.

        Notes
        -----
        This is useful for tables larger than memory; see docs/explanation/performance.md. It advises the kernel
        (`MADV_WILLNEED`), which may ignore it, as does a call made while 64 earlier ones still wait for the disk. In a
        table open for writing the optimiser's state is read too.

        Examples
        --------
        >>> import hashemb, tempfile
        >>> table = hashemb.create(tempfile.mkdtemp() + "/t.emb", num_embeddings=1000, embedding_dim=4)
        >>> table.prefetch([4, 5, 6])  # the next batch
        >>> vectors = table.lookup([1, 2, 3])
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
        """Apply one optimiser step.

        Parameters
        ----------
        keys, offsets, pooling, per_sample_weights
            The arguments of the `lookup` whose result was used.
        grads : array_like of float
            Gradient of the loss with respect to that result, of the same shape.

        Raises
        ------
        ValueError
            Shapes do not match, or gradients are NaN or infinite; nothing has been written.
        ReadOnlyTableError, ClosedTableError
        NoSpaceError
            The file system is full; nothing has been written, and the call can be repeated.
        TableBusyError
            A signal handler or callback made the call during `apply_delta` to the same table in the same thread.

        Notes
        -----
        A signal handler runs before or after the batch is applied, never during it, and may use the table or raise.
        Other threads must not change `grads` during the call: values that become NaN or infinite do not reach the
        table, and a `ValueError` says how many rows were left unchanged.

        Gradients of the same row (from equal or colliding keys) are summed in batch order, and each distinct row is
        stepped once. The result has the same bits for any number of threads. A call with no keys counts as a step too.
        """
        core, files = self._writable()
        keys, offsets, weights, code, shape = arguments.batch(
            keys, offsets, pooling, per_sample_weights, self.embedding_dim
        )
        grads = arguments.float_array("grads", grads, shape)
        plan = core.plan(keys, grads, offsets, weights, code)
        saves = files.saves
        target = saves.target
        need = core.apply(plan, self.isolation == "exact", target.saving if target else None)
        if need:
            files.apply(core, plan, need, exact=self.isolation == "exact")
        if saves.target is not None or plan.num_fresh:
            files.after_batch(plan.fresh_blocks)

    @property
    def lr(self) -> float:
        """Learning rate, shared by every process that has the table open; for FTRL, alpha."""
        return float(self._open_files().control["lr"][0])

    @lr.setter
    def lr(self, value: float) -> None:
        self._writable()[1].control["lr"] = arguments.learning_rate(value, self.optimizer)

    # -- looking inside --

    @property
    def weight(self) -> npt.NDArray[Any]:
        """Read-only view of the stored weights, (num_embeddings, embedding_dim); bfloat16 is shown as uint16.

        Values are raw: rows never written are zero, and weight decay that a row still owes is not applied.
        """
        return _read_only(self._open_files().arrays["weight"])

    @property
    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Read-only views of the optimiser's state arrays, by name."""
        arrays = self._open_files().arrays
        return {name: _read_only(arrays[name]) for name in self._meta.row_files if name != "weight"}

    @property
    def step(self) -> int:
        """Number of updates applied so far by all processes."""
        return int(self._open_files().control["step"][0])

    def stats(self, exact: bool = False) -> TableStats:
        """Return how full the table is; with `exact`, count rows by reading every block ever written."""
        files, num_rows = self._open_files(), self.num_embeddings
        with files.calls:
            touched = files.count_rows() if exact else int(files.control["rows_touched"][0])
            sizes = files.sizes()
        return TableStats.estimate(min(touched, num_rows), num_rows, self.num_hashes, exact=exact, **sizes)

    # -- points in time --

    def snapshot(
        self,
        dst: str | os.PathLike[str],
        *,
        extra: dict[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SnapshotInfo:
        """Copy the table as it is at one point in time, while writers in any process continue.

        Parameters
        ----------
        dst : str or path-like
            Directory to create: a complete table with checksums (see `hashemb.verify`).
        extra : dict, optional
            JSON data to keep with it, e.g. the position in the training data: `hashemb.info(dst).snapshot.extra`.
        progress : callable, optional
            Called with the number of blocks saved so far and the total.

        Returns
        -------
        SnapshotInfo

        Raises
        ------
        FileExistsError, FileNotFoundError
            `dst` exists already, or its parent does not exist.
        NoSpaceError, OSError
            This process, or a writer that had to save a row, could not write; nothing is left.
        ReadOnlyTableError, ClosedTableError, or HashembError if all 2**32 - 1 epochs are used up

        Notes
        -----
        The point in time is between batches: the call waits for those in progress. From then on a writer saves the old
        content of a row before changing it, while this call copies all written blocks, restores those rows in the copy,
        and syncs it. One snapshot or delta of a table is taken at a time; a second call waits.
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
        """Write the changes since a point in time to one file for `hashemb.apply_delta`, while writers continue.

        Parameters
        ----------
        since : None, str, path-like, SnapshotInfo or DeltaInfo
            A snapshot or delta in this table's history, or the path of one. None exports everything, to start a chain.
        path : str or path-like
            File to create. Name it ``*.delta`` for `hashemb.follow` to find it.
        state : bool
            Whether to include the optimiser's state, for further training. By default, only what look-ups need.
        dtype : {"float32", "float16", "bfloat16"}, optional
            Dtype of the weights in the file, rounded to nearest even. Default: the table's dtype.
        progress : callable, optional
            Called with the number of blocks packed so far and the total.

        Returns
        -------
        DeltaInfo

        Raises
        ------
        ValueError
            `since` is not in the table's history, `state` is given with another dtype, or `dtype` cannot hold a weight.
        FileExistsError, FileNotFoundError
            `path` exists already, or its directory does not exist.
        NoSpaceError, OSError
            The file could not be written; nothing is left at `path`.
        DeltaError
            A delta was partly applied to the table itself.
        ReadOnlyTableError, ClosedTableError, or HashembError as for `snapshot`

        Notes
        -----
        The point in time is as for `snapshot`. The file holds whole blocks, about 4096 bytes of weights each, and
        appears complete and synced, or not at all. Each block is read and written twice, through files next to `path`.
        """
        _, files = self._writable()
        return export_to(files, since, arguments.path_string(path), state=state, dtype=dtype, progress=progress)

    def _apply_delta(self, delta: DeltaReader, progress: Callable[[int, int], None] | None = None) -> DeltaInfo:
        """Apply a delta that has been checked; see `hashemb.apply_delta`."""
        return apply_to(self._writable()[1], delta, progress)

    # -- life --

    def flush(self) -> None:
        """Write all updates made so far to disk, and return when they are durable. Only unwritten pages are written."""
        with (files := self._open_files()).calls:
            files.flush()

    def close(self) -> None:
        """Close the table; closing it again has no effect.

        Calls in other threads end first: updates and look-ups complete, longer ones raise `ClosedTableError`.
        Arrays from `weight` and `state` stay valid.

        Raises
        ------
        TableBusyError
            A signal handler or callback made the call during another call of the same thread.
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
        return self._core or self._raise_closed()

    def _open_files(self) -> TableFiles:
        return self._files or self._raise_closed()

    def _writable(self) -> tuple[_core.Core, TableFiles]:
        core, files = self._core, self._files
        if core is None or files is None:
            self._raise_closed()
        if self.mode == "r":
            raise ReadOnlyTableError(f'{self.path} is open read-only; open it with mode="r+"')
        return core, files

    def _raise_closed(self) -> NoReturn:
        raise ClosedTableError(f"{self.path} has been closed")


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
