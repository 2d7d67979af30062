"""What the models have in common: how examples become look-ups, probabilities, and gradients of rows of one table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb.ctr._examples import Examples, check_examples, check_labels, check_weights
from hashemb.ctr._maths import BLOCK_EXAMPLES, DistinctKeys, Maths

if TYPE_CHECKING:
    from hashemb import EmbeddingTable

__all__ = ["BIAS_FIELD", "HashedModel"]

Float32Array = npt.NDArray[np.float32]
KeyArray = npt.NDArray[Any]
Numbering = tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]

BIAS_FIELD = "hashemb.bias"  # reserved: no data column may have this name
_CHUNK_BYTES = 1 << 20  # of vectors between look-up and maths: half of a common per-core L2 cache
_LINE_BYTES = 64


class HashedModel:
    """What the models have in common: examples in, probabilities out, gradients to the table.

    An example is a set of keys, each with a field and a value x. It comes in one of two forms:

    * matrix: `keys` (n, num_fields), column j being field j, as `hashemb.hash_fields` returns them;
    * ragged: `keys` (num_keys,) and `offsets` (n + 1,); example i owns ``keys[offsets[i]:offsets[i + 1]]``, which may
      be none, and `fields` says the field of each.

    A vector's element 0 is the linear weight w, the rest are the factors v. The bias is element 0 of the vector of one
    reserved key (`BIAS_FIELD`), so that all that is learned is in the table and shared by every process attached to it.

    Attributes
    ----------
    table : EmbeddingTable
    rank : int
    num_fields : int or None
        Of a model that tells fields apart.

    Notes
    -----
    The loss is *summed* over the batch, each example's times its weight, never averaged. Adagrad doesn't see a constant
    factor of the gradient, and with SGD `lr` keeps its meaning per example whatever the batch size.

    An example's probability doesn't depend on the batch it comes in, nor do bits on the CPU or the number of threads:
    sums have a fixed order, and the logistic function is computed with +, -, *, / alone, in double precision, and
    rounded to float32 once (off by at most .501 units in the last place).

    Not safe for concurrent calls on one object (it reuses its buffers); give each thread its own object on the
    shared table.
    """

    kind: str
    rank: int
    num_fields: int | None = None

    def __init__(self, table: EmbeddingTable) -> None:
        self.table = table
        self._reserved_keys = self._reserved()
        self._maths = Maths(self.kind, table.embedding_dim, self.num_fields or 0)
        self._distinct = DistinctKeys()
        self._keys, self._index = np.empty(0, np.uint64), np.empty(0, np.int32)
        self._vectors = self._gradients = np.empty((0, table.embedding_dim), np.float32)

    def __repr__(self) -> str:
        fields = "" if self.num_fields is None else f"num_fields={self.num_fields}, "
        return f"{type(self).__name__}({fields}rank={self.rank}, table={self.table!r})"

    def _reserved(self) -> npt.NDArray[np.uint64]:
        """The reserved keys, that of the bias first."""
        return hashemb.hash_keys(["bias"], field=BIAS_FIELD)

    def predict_logits(
        self, keys: KeyArray, *, offsets: Any = None, values: Any = None, fields: Any = None
    ) -> Float32Array:
        """Log-odds of each example, float32 (n,); arguments as for `predict_proba`."""
        return self._predict(check_examples(keys, offsets, values, fields, num_fields=self.num_fields), logits=True)

    def predict_proba(
        self, keys: KeyArray, *, offsets: Any = None, values: Any = None, fields: Any = None
    ) -> Float32Array:
        """Probability of label 1 for each example.

        Parameters
        ----------
        keys : integer array, shape (n, num_fields); or (num_keys,) with `offsets`
            Hashed keys.
        offsets : integer array, shape (n + 1,), optional
            Of the ragged form: 0 first, never falling, ``len(keys)`` last.
        values : array_like of float, shape of keys, optional
            Feature values x. Default: all 1.
        fields : integer array, shape (num_keys,), optional
            Field of each key, in the ragged form; needed by models that tell fields apart, ignored by others.

        Returns
        -------
        ndarray of float32, shape (n,)

        Raises
        ------
        TypeError, ValueError
            Arguments of wrong type, shape or range, values that are not finite.
        """
        return self._predict(check_examples(keys, offsets, values, fields, num_fields=self.num_fields), logits=False)

    def learn(
        self,
        keys: KeyArray,
        labels: npt.ArrayLike,
        *,
        offsets: Any = None,
        values: Any = None,
        fields: Any = None,
        weights: npt.ArrayLike | None = None,
        numbering: Numbering | None = None,
    ) -> Float32Array:
        """Score a batch, then take one optimiser step on its summed logistic loss.

        Parameters
        ----------
        keys, offsets, values, fields
            As for `predict_proba`.
        labels : array_like, shape (n,)
            In [0, 1]; 0 or 1 for clicks.
        weights : array_like, shape (n,), optional
            Importance of each example, finite and >= 0: what its loss is multiplied by. Default: all 1.
        numbering : (ndarray of uint64, ndarray of int32), optional
            The distinct keys of the batch, and where in them each key stands, if they are known: `Batch.numbering`.
            That they are those of `keys` is not checked.

        Returns
        -------
        ndarray of float32, shape (n,)
            Probabilities *before* the update: what progressive validation is made of.

        Raises
        ------
        TypeError, ValueError
            Arguments of wrong type, shape or range.
        FloatingPointError
            A logit is not finite: the model has diverged.
        ReadOnlyTableError
            The table is open "r".

            The table is as before the call after any of them.

        Notes
        -----
        One look-up and one update of the rows of the batch's distinct keys, and O(keys x embedding_dim) arithmetic; for
        field-weighted and field-aware models O(keys x keys of the example x rank). The gradients of a key are summed in
        the order of the examples.
        """
        examples = check_examples(keys, offsets, values, fields, num_fields=self.num_fields)
        y, w = check_labels(labels, examples.count), check_weights(weights, examples.count)
        probabilities = np.empty(examples.count, np.float32)
        if examples.count == 0:
            return probabilities
        first = len(self._reserved_keys)
        keys, vectors, gradients, index = self._find_distinct(examples.keys, numbering)
        self.table.lookup(keys, out=vectors)
        self._maths.start()
        self._run(vectors, examples, probabilities, index=index, labels=y, weights=w, gradients=gradients[first:])
        _check_finite(probabilities)
        self._put_shared_gradients(gradients[:first])
        self.table.update(keys, gradients)
        return probabilities

    def _predict(self, examples: Examples, *, logits: bool) -> Float32Array:
        """Look up, then compute, chunk by chunk, so that vectors are still in cache when they are used."""
        first = len(self._reserved_keys)
        out = np.empty(examples.count, np.float32)
        for start, stop in self._chunks(examples):
            part = examples.part(start, stop)
            self._reserve(count := part.keys.size)
            self._keys[first : first + count].reshape(part.keys.shape)[...] = part.keys
            vectors = self._vectors[: first + count]
            self.table.lookup(self._keys[: first + count], out=vectors)
            self._run(vectors, part, out[start:stop], logits=logits)
        return out

    def _run(self, vectors: Float32Array, examples: Examples, out: Float32Array, **learning: Any) -> None:
        """The kernels, on the vectors of the reserved keys and then those of the examples."""
        first = len(self._reserved_keys)
        self._maths.run(
            vectors[first:],
            out,
            num_fields=examples.num_fields,
            offsets=examples.offsets,
            values=examples.values,
            fields=examples.fields,
            num_threads=hashemb.get_num_threads(),
            **self._shared(vectors[:first]),
            **learning,
        )

    def _find_distinct(
        self, keys: KeyArray, numbering: Numbering | None
    ) -> tuple[npt.NDArray[np.uint64], Float32Array, Float32Array, npt.NDArray[np.int32]]:
        """The reserved and the distinct keys, room for their vectors, gradients of 0, and where each key stands.

        A batch of clicks repeats most of its keys: 1,024 rows of Criteo's file have 8 distinct keys a row, of 39.
        """
        first = len(self._reserved_keys)
        self._reserve(keys.size)
        index, room = self._index[: keys.size], self._keys[first : first + keys.size]
        if numbering is None:
            count = first + self._distinct.find(np.ascontiguousarray(keys, np.uint64).reshape(-1), room, index)
        else:
            distinct, index = numbering
            count = first + len(distinct)
            self._keys[first:count] = distinct
        gradients = self._gradients[:count]
        gradients.fill(0.0)
        return self._keys[:count], self._vectors[:count], gradients, index

    def _chunks(self, examples: Examples) -> Iterator[tuple[int, int]]:
        """Ranges of examples whose vectors fit the cache; cut where no sum depends on it."""
        keys_each = examples.keys.size // max(1, examples.count) + 1
        size = max(1, _CHUNK_BYTES // (4 * self.table.embedding_dim * keys_each * BLOCK_EXAMPLES)) * BLOCK_EXAMPLES
        for start in range(0, examples.count, size):
            yield start, min(start + size, examples.count)

    def _reserve(self, num_keys: int) -> None:
        """Make room for the reserved keys and so many others."""
        first, dim = len(self._reserved_keys), self.table.embedding_dim
        count = first + num_keys
        if self._keys.size < count:
            self._keys, self._index = np.empty(count, np.uint64), np.empty(count, np.int32)
            self._keys[:first] = self._reserved_keys
            self._vectors, self._gradients = (_empty_at_line(count * dim).reshape(count, dim) for _ in range(2))

    def _shared(self, vectors: Float32Array) -> dict[str, Any]:
        """What all examples share, from the vectors of the reserved keys, as arguments of the kernels."""
        return {"bias": float(vectors[0, 0])}

    def _put_shared_gradients(self, vectors: Float32Array) -> None:
        """Turn the vectors of the reserved keys into their gradients."""
        vectors[...] = 0.0
        vectors[0, 0] = self._maths.residual


def _empty_at_line(count: int) -> Float32Array:
    """An array of `count` floats that begins at a cache line, so that rows of 64 bytes are one line each."""
    raw = np.empty(count + _LINE_BYTES // 4, np.float32)
    first = -(raw.ctypes.data // 4) % (_LINE_BYTES // 4)
    return raw[first : first + count]


def _check_finite(probabilities: Float32Array) -> None:
    finite = np.isfinite(probabilities)
    if not finite.all():
        first = int(np.argmin(finite))
        raise FloatingPointError(
            f"the logit of example {first} of the batch is {probabilities[first]}: the model has diverged; "
            "train a new table with a lower lr"
        )
