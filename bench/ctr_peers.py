"""Typical programs for scikit-learn, river and torch: one pass over Vowpal Wabbit's text, one process each.

``python -m bench.ctr_peers '{"peer": …, "path": …, "settings": {…}, "predictions": …}'`` prints a line of JSON. If
`predictions` is a path, each example is scored before it is learned and the probabilities are written there. Timed runs
leave it out, because these libraries would have to compute the scores for this purpose alone.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.ctr_data import NAMESPACES

ROWS = 1 << 22  # as many weights as Vowpal Wabbit's -b 22 and our default
RANK = 15
Floats = npt.NDArray[np.float32]
Tokens = list[list[str]]


def examples(path: str) -> Iterator[tuple[float, list[str]]]:
    """Yield (label, tokens such as "a 4") for each line."""
    with open(path, encoding="ascii") as file:
        for line in file:
            label, *tokens = line.rstrip("\n").split(" |")
            yield float(label == "1"), tokens


def chunks(path: str, size: int) -> Iterator[tuple[Floats, Tokens]]:
    """Yield the same in lists of `size`."""
    source = examples(path)
    while part := list(itertools.islice(source, size)):
        yield np.array([label for label, _ in part], np.float32), [tokens for _, tokens in part]


Learn = Callable[[bool], Iterator[tuple[Floats, Any]]]


def sklearn_lr(path: str, score: bool, **settings: Any) -> Iterator[tuple[Floats, Any]]:
    """Train scikit-learn's FeatureHasher and SGDClassifier, 1,000 rows at a time."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import SGDClassifier

    hasher = FeatureHasher(ROWS, input_type="string", dtype=np.float32)
    model = SGDClassifier(loss="log_loss", random_state=0, **settings)
    for number, (labels, tokens) in enumerate(chunks(path, 1000)):
        x = hasher.transform(tokens)
        constant = np.full(len(labels), 0.5)
        yield labels, (model.predict_proba(x)[:, 1] if number else constant) if score else None
        model.partial_fit(x, labels, classes=[0.0, 1.0])


def river_lr(path: str, score: bool, *, lr: float) -> Iterator[tuple[Floats, Any]]:
    """Train river's FeatureHasher and LogisticRegression, one row at a time."""
    from river import linear_model, optim, preprocessing

    hasher = preprocessing.FeatureHasher(n_features=ROWS, seed=0)
    model = linear_model.LogisticRegression(optimizer=optim.AdaGrad(lr))
    for label, tokens in examples(path):
        x = hasher.transform_one(dict.fromkeys(tokens, 1))
        yield np.array([label], np.float32), [model.predict_proba_one(x)[True]] if score else None
        model.learn_one(x, bool(label))


def ids(tokens: Tokens, rows: int) -> npt.NDArray[np.int64]:
    """Return ids from 1, one column per namespace; 0 where a value is missing."""
    found = np.zeros((len(tokens), len(NAMESPACES)), np.int64)
    column = {letter: j for j, letter in enumerate(NAMESPACES)}
    for row, line in zip(found, tokens, strict=True):
        for token in line:
            row[column[token[0]]] = 1 + zlib.crc32(token.encode()) % (rows - 1)
    return found


def torch_fm(path: str, score: bool, *, batch: int, lr: float, accumulator: float) -> Iterator[tuple[Floats, Any]]:
    """Train a factorisation machine as one nn.Embedding with sparse gradients and torch's Adagrad.

    Column 0 is the linear weight. nn.EmbeddingBag cannot sum squares, so the individual vectors are needed.
    """
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    weights = torch.nn.Embedding(ROWS, 1 + RANK, padding_idx=0, sparse=True)
    torch.nn.init.uniform_(weights.weight, -0.01, 0.01)
    bias = torch.nn.Parameter(torch.zeros(1))
    parameters = [*weights.parameters(), bias]
    optimizer = torch.optim.Adagrad(parameters, lr=lr, initial_accumulator_value=accumulator)
    for labels, tokens in chunks(path, batch):
        vectors = weights(torch.from_numpy(ids(tokens, ROWS)))
        v = vectors[:, :, 1:]
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)
        logits = bias + vectors[:, :, 0].sum(1) + pairs
        loss = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels), reduction="sum")
        yield labels, torch.sigmoid(logits.detach()).numpy() if score else None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def deepctr_fm(path: str, score: bool, *, batch: int) -> Iterator[tuple[Floats, Any]]:
    """Train DeepCTR-Torch's DeepFM without a deep part, with its Adagrad; it has no progressive validation."""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DeepFM

    if score:
        raise SystemExit("DeepCTR-Torch is run for its rate alone")
    size = ROWS // len(NAMESPACES)
    columns = [SparseFeat(letter, size, embedding_dim=RANK) for letter in NAMESPACES]
    model = DeepFM(columns, columns, dnn_hidden_units=(), device="cpu")
    model.compile("adagrad", "binary_crossentropy")
    for labels, tokens in chunks(path, 1 << 16):
        found = ids(tokens, size)
        inputs = {letter: found[:, j] for j, letter in enumerate(NAMESPACES)}
        model.fit(inputs, labels, batch_size=batch, epochs=1, verbose=0, shuffle=False)
        yield labels, None


PEERS: dict[str, Callable[..., Iterator[tuple[Floats, Any]]]] = {
    "sklearn": sklearn_lr,
    "river": river_lr,
    "torch": torch_fm,
    "deepctr": deepctr_fm,
}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the peer and return how many examples and positives it has learned."""
    count, positives = 0, 0.0
    probabilities: list[Any] = []
    target = spec["predictions"]
    for labels, scored in PEERS[spec["peer"]](spec["path"], target is not None, **spec["settings"]):
        count, positives = count + len(labels), positives + float(labels.sum())
        if scored is not None:
            probabilities.append(scored)
    if target is not None:
        joined = np.concatenate(probabilities).astype(np.float32)
        if not math.isfinite(float(joined.sum())):
            raise SystemExit("a probability is not finite")
        np.save(target, joined)
    return {"examples": count, "positives": round(positives)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
