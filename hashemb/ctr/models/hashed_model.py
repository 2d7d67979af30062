"""The base of all models: convert examples to look-ups, probabilities, and gradients of the rows of one table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hashemb
from hashemb.ctr._maths import BLOCK_EXAMPLES, DistinctKeys, Maths
from hashemb.ctr._types import Array, Float32Array
from hashemb.ctr.models.examples import Examples, check_examples, check_labels, check_weights

if TYPE_CHECKING:
    from hashemb import EmbeddingTable

__all__ = ["BIAS_FIELD", "HashedModel"]

Numbering = tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]

BIAS_FIELD = "hashemb.bias"  # reserved: no data column may have this name
_CHUNK_BYTES = 1 << 20  # bytes of vectors per look-up: half of a common per-core L2 cache
_LINE_BYTES = 64


class HashedModel:
    """Base class of the models: computes probabilities of examples and passes gradients to the table.

    An example is a set of keys, each with a field and a value x. Examples are passed in one of two forms:

    * matrix: `keys` (n, num_fields), where column j is field j, as returned by `hashemb.hash_fields`;
    * ragged: `keys` (num_keys,) and `offsets` (n + 1,); example i has the keys ``keys[offsets[i]:offsets[i + 1]]``,
      which may be empty, and `fields` holds the field of each key.

    Element 0 of a vector is the linear weight w, the others are the factors v. The bias is element 0 of the vector of a
    reserved key (`BIAS_FIELD`), so all learned state is in the table and shared by every process attached to it.

    Attributes
    ----------
    table : EmbeddingTable
        The table that holds all parameters.
    rank : int
        Number of latent factors.
    num_fields : int or None
        Number of fields, for models that distinguish fields.

    Notes
    -----
    The loss is the weighted *sum* over the batch, never the average. Adagrad is invariant to a constant factor of the
    gradient, and with SGD the meaning of `lr` per example does not depend on the batch size.

    An example's probability does not depend on its batch, and no bit depends on the CPU or the number of threads: sums
    have a fixed order, and the logistic function is computed only with +, -, * and /, in double precision, and rounded
    to float32 once (with an error of at most .501 units in the last place).

    One object is not safe for concurrent calls, because it reuses its buffers; give each thread its own object on the
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
        """Return the reserved keys, starting with that of the bias."""
        return hashemb.hash_keys(["bias"], field=BIAS_FIELD)

    def predict_logits(
        self, keys: Array, *, offsets: Any = None, values: Any = None, fields: Any = None
    ) -> Float32Array:
        """Predict the log-odds of each example, float32 (n,); arguments as for `predict_proba`."""
        return self._predict(check_examples(keys, offsets, values, fields, num_fields=self.num_fields), logits=True)

    def predict_proba(
        self, keys: Array, *, offsets: Any = None, values: Any = None, fields: Any = None
    ) -> Float32Array:
        """Predict the probability of label 1 for each example.

        Parameters
        ----------
        keys : integer array, shape (n, num_fields); or (num_keys,) with `offsets`
            Hashed keys.
        offsets : integer array, shape (n + 1,), optional
            Offsets of the ragged form: they start with 0, never decrease, and end with ``len(keys)``.
        values : array_like of float, shape of keys, optional
            Feature values x. Default: all 1.
        fields : integer array, shape (num_keys,), optional
            Field of each key, in the ragged form; required by models that distinguish fields, ignored by others.

        Returns
        -------
        ndarray of float32, shape (n,)

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, shape or range, or a value is not finite.
        """
        return self._predict(check_examples(keys, offsets, values, fields, num_fields=self.num_fields), logits=False)

    def learn(
        self,
        keys: Array,
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
            Labels in [0, 1]; 0 or 1 for clicks.
        weights : array_like, shape (n,), optional
            Importance of each example, finite and >= 0: a factor of its loss. Default: all 1.
        numbering : (ndarray of uint64, ndarray of int32), optional
            The distinct keys of the batch, and the position of each key among them, if they are known:
            `Batch.numbering`. Whether they match `keys` is not checked.

        Returns
        -------
        ndarray of float32, shape (n,)
            Probabilities from *before* the update, as used by progressive validation.

        Raises
        ------
        TypeError, ValueError
            An argument has the wrong type, shape or range.
        FloatingPointError
            A logit is not finite: the model has diverged.
        ReadOnlyTableError
            The table is open in mode "r".

            None of these errors changes the table.

        Notes
        -----
        The call takes one look-up and one update of the rows of the batch's distinct keys, and O(keys x embedding_dim)
        arithmetic; for field-weighted and field-aware models, O(keys x keys of the example x rank). The gradients of a
        key are summed in the order of the examples.
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
        """Look up and compute chunk by chunk, so that vectors are still in cache when they are used."""
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
        """Run the kernels on the vectors of the reserved keys and those of the examples."""
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
        self, keys: Array, numbering: Numbering | None
    ) -> tuple[npt.NDArray[np.uint64], Float32Array, Float32Array, npt.NDArray[np.int32]]:
        """Find the distinct keys; return them after the reserved keys, with buffers and the position of each key.

        The buffers are space for the vectors and gradients of 0. A batch of clicks repeats most of its keys: in 1,024
        rows of Criteo's file there are 8 distinct keys per row, out of 39.
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
        """Yield ranges of examples whose vectors fit the cache; no sum depends on where they are cut."""
        keys_each = examples.keys.size // max(1, examples.count) + 1
        size = max(1, _CHUNK_BYTES // (4 * self.table.embedding_dim * keys_each * BLOCK_EXAMPLES)) * BLOCK_EXAMPLES
        for start in range(0, examples.count, size):
            yield start, min(start + size, examples.count)

    def _reserve(self, num_keys: int) -> None:
        """Reserve buffers for the reserved keys and `num_keys` others."""
        first, dim = len(self._reserved_keys), self.table.embedding_dim
        count = first + num_keys
        if self._keys.size < count:
            self._keys, self._index = np.empty(count, np.uint64), np.empty(count, np.int32)
            self._keys[:first] = self._reserved_keys
            self._vectors, self._gradients = (_empty_at_line(count * dim).reshape(count, dim) for _ in range(2))

    def _shared(self, vectors: Float32Array) -> dict[str, Any]:
        """Return the parameters shared by all examples, from the vectors of the reserved keys, as kernel arguments."""
        return {"bias": float(vectors[0, 0])}

    def _put_shared_gradients(self, vectors: Float32Array) -> None:
        """Replace the vectors of the reserved keys by their gradients."""
        vectors[...] = 0.0
        vectors[0, 0] = self._maths.residual


def _empty_at_line(count: int) -> Float32Array:
    """Allocate `count` floats, aligned to a cache line, so that each row of 64 bytes takes one line."""
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
