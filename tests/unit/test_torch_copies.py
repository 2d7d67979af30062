"""Copies of modules on a table: checkpoints, copies and pickles, and other processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import in_forked_child, in_processes

import hashemb

torch = pytest.importorskip("torch")
from hashemb.torch import Embedding, EmbeddingBag, TableOptimizer  # noqa: E402

KEYS = torch.tensor([[1, 2], [3, -1]])
DIM = 4


@pytest.fixture
def table(tmp_path: Path) -> Iterator[hashemb.EmbeddingTable]:
    with create(tmp_path / "t.emb") as created:
        yield created


def create(path: Path, **options: Any) -> hashemb.EmbeddingTable:
    return hashemb.create(path, num_embeddings=1000, embedding_dim=DIM, optimizer=hashemb.Adagrad(lr=0.1), **options)


def twin(table: hashemb.EmbeddingTable) -> hashemb.EmbeddingTable:
    """Make another table with the same rows."""
    return create(Path(table.path + ".twin"))


def loss_of(vectors: Any) -> Any:
    return vectors.square().sum() + vectors.sum()


# ---- checkpoints and copies ----


def test_state_dict_refers_to_the_table(table: hashemb.EmbeddingTable, tmp_path: Path) -> None:
    model = torch.nn.Sequential(Embedding(table), torch.nn.Linear(DIM, 1))
    model(KEYS).sum().backward()
    table.snapshot(tmp_path / "saved.emb")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()))
    assert saved["0._extra_state"] == {"path": table.path, "id": hashemb.info(table.path).id, "step": 1}
    model.load_state_dict(saved)
    model(KEYS).sum().backward()
    with pytest.warns(RuntimeWarning, match="is at step 2, the state was saved at step 1"):
        model.load_state_dict(saved)
    with hashemb.open(tmp_path / "saved.emb", "r+") as restored:  # the table of that moment works as well
        torch.nn.Sequential(Embedding(restored), torch.nn.Linear(DIM, 1)).load_state_dict(saved)
    with twin(table) as other, pytest.raises(ValueError, match="the state is of table"):
        torch.nn.Sequential(Embedding(other), torch.nn.Linear(DIM, 1)).load_state_dict(saved)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_open_the_same_table(table: hashemb.EmbeddingTable, duplicate: Any) -> None:
    bag = EmbeddingBag(table, mode="sum", padding_idx=0)
    TableOptimizer(bag)
    other = duplicate(bag)
    assert (other.mode, other.padding_idx, other.table.mode) == ("sum", 0, "r+")
    other(KEYS).sum().backward()
    assert table.step == 1
    assert torch.equal(bag(KEYS), other(KEYS))
    other.table.close()


def test_a_copy_of_a_table_that_was_replaced(table: hashemb.EmbeddingTable) -> None:
    data = pickle.dumps(Embedding(table))
    table.close()
    Path(table.path).rename(table.path + ".gone")
    create(Path(table.path)).close()
    with pytest.raises(ValueError, match="holds table"):
        pickle.loads(data)


# ---- processes ----


def _vectors_seen_by(path: str) -> list[Any]:
    with hashemb.open(path) as reader:
        return [hashemb.info(path).step, Embedding(reader)(KEYS).tolist()]


def test_a_second_process_reads_while_this_one_trains(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    for step in (1, 2):
        loss_of(embedding(KEYS)).backward()
        [seen] = in_processes(_vectors_seen_by, [(table.path,)])
        assert seen == [step, table.lookup(KEYS.numpy()).tolist()]


class _Examples(torch.utils.data.Dataset):
    """A dataset of vectors that are looked up in the worker."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        with torch.no_grad():
            return self.embedding(hashemb.hash_keys([f"user {i}"]))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_look_up(table: hashemb.EmbeddingTable, method: str) -> None:
    embedding = Embedding(table)
    embedding(hashemb.hash_keys(["user 3"])).sum().backward()
    loader = torch.utils.data.DataLoader(
        _Examples(embedding), batch_size=4, num_workers=1, multiprocessing_context=method
    )
    found = torch.cat(list(loader)).squeeze(1)
    assert torch.equal(found, embedding(hashemb.hash_keys([f"user {i}" for i in range(8)])).detach())


def test_a_forked_child_trains(table: hashemb.EmbeddingTable) -> None:
    embedding = Embedding(table)
    embedding(KEYS).sum().backward()
    in_forked_child(lambda: embedding(KEYS).sum().backward())
    assert table.step == 2
