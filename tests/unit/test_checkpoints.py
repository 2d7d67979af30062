"""Checkpoints: where training resumes after a kill, and which deltas a server may have by then."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb.ctr.training import Checkpoints, ModelCard, SourcePosition, read_card
from hashemb.ctr.training.model_dir import write_card
from hashemb.errors import FormatError, HashembError

KEYS = np.arange(50)


class Model:
    """A model directory whose trainer counts batches in its card, as a position."""

    def __init__(self, directory: Path) -> None:
        self.path, self.snapshots, self.deltas = (directory / name for name in ("m", "snapshots", "deltas"))
        self.checkpoints = Checkpoints(self.snapshots, self.deltas)
        options: dict[str, Any] = {"optimizer": hashemb.SGD(lr=1.0), "init": hashemb.Zeros()}
        self.table = hashemb.create(self.path, num_embeddings=4096, embedding_dim=4, **options)
        self.card = ModelCard(rank=3, schema={"a": "string"}, sources={"/data": SourcePosition(9, "x")})
        write_card(self.path, self.card)

    def learn(self, batches: int) -> None:
        for _ in range(batches):
            self.table.update(KEYS, np.ones((50, 4), np.float32))
            self.card.sources["/data"].rows += 50

    def save(self) -> None:
        self.table.flush()
        self.card.table_step = self.table.step
        write_card(self.path, self.card)
        self.checkpoints.take(self.table, self.card)

    def resume(self) -> int | None:
        step = self.checkpoints.resume(self.path)
        self.table, self.card = hashemb.open(self.path, "r+"), read_card(self.path)
        return step

    def kill(self) -> None:
        """Leave the table as SIGKILL does: the rows are written, and the control page is marked as in use."""
        kept = (self.path / "control").read_bytes()
        self.table.close()
        (self.path / "control").write_bytes(kept)

    def published(self) -> list[int]:
        return [hashemb.delta_info(path).step for path in sorted(self.deltas.glob("*.delta"))]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    made = Model(tmp_path)
    made.save()
    return made


def test_a_killed_trainer_goes_on_from_its_checkpoint(model: Model) -> None:
    model.learn(3)
    model.save()
    model.learn(2)
    model.kill()
    assert model.resume() == 3
    assert (model.table.step, model.card.sources["/data"].rows, model.card.table_step) == (3, 150, 3)
    rows, counts = np.unique(model.table.rows(KEYS), return_counts=True)
    alone = np.isin(model.table.rows(KEYS), rows[counts == 1])
    np.testing.assert_array_equal(model.table.lookup(KEYS)[alone], -3.0)
    assert sorted(path.name for path in model.path.parent.iterdir()) == ["deltas", "m", "snapshots"]


def test_one_that_was_closed_is_left_alone(model: Model) -> None:
    model.learn(3)
    model.table.flush()
    model.card.table_step = model.table.step
    write_card(model.path, model.card)
    model.table.close()
    assert model.resume() is None
    assert (model.table.step, model.card.sources["/data"].rows) == (3, 150)


@pytest.mark.parametrize("moment", ["export", "snapshot", "publish"])
def test_a_server_never_has_what_a_kill_takes_back(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """If training is killed between the steps of a checkpoint and then continues, the replica follows to the end."""
    replica = tmp_path / "replica"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model.learn(2)
    model.save()
    hashemb.follow(replica, model.deltas)
    model.learn(2)
    with monkeypatch.context() as patch:
        if moment == "export":
            patch.setattr(hashemb.EmbeddingTable, "export_delta", killed)
        elif moment == "snapshot":
            patch.setattr(hashemb.EmbeddingTable, "snapshot", killed)
        else:
            patch.setattr(os, "rename", _fails_on_publishing(os.rename, killed))
        with pytest.raises(KeyboardInterrupt):
            model.save()
    model.kill()
    assert model.resume() == (4 if moment == "publish" else 2)
    assert model.published() == ([0, 2, 4] if moment == "publish" else [0, 2])
    hashemb.follow(replica, model.deltas)
    model.learn(3)
    model.save()
    status = hashemb.follow(replica, model.deltas)
    assert (status.step, status.pending, status.skipped) == (model.table.step, 0, {})
    with hashemb.open(replica) as served:
        np.testing.assert_array_equal(served.lookup(KEYS), model.table.lookup(KEYS))
    assert not list(model.deltas.glob("*.pending"))


def _fails_on_publishing(rename: Any, fail: Any) -> Any:
    return lambda src, dst, **fds: fail() if str(src).endswith(".pending") else rename(src, dst, **fds)


def test_two_checkpoints_are_kept_and_one_of_the_same_step_is_not_taken_again(model: Model) -> None:
    for _ in range(4):
        model.learn(1)
        model.save()
        model.save()
    assert [path.name[-2:] for path in sorted(model.snapshots.iterdir())] == ["03", "04"]
    assert model.published() == [0, 1, 2, 3, 4]


def test_nothing_to_go_back_to(model: Model, tmp_path: Path) -> None:
    model.learn(1)
    model.kill()
    with pytest.raises(HashembError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "others").resume(model.path)
    assert Checkpoints(tmp_path / "others").resume(tmp_path / "none") is None


@pytest.mark.parametrize("damage", [{"rank": "3"}, {"kind": "tree"}, {"sources": None}, {"progress": {"pass": 1}}])
def test_a_card_that_cannot_be_read_leaves_the_model_as_it_is(model: Model, damage: dict[str, Any]) -> None:
    model.learn(1)
    place = model.snapshots / "step-000000000000001"
    model.table.snapshot(place, extra={"model": {**asdict(model.card), "format": 1, **damage}, "delta": None})
    model.learn(1)
    model.kill()
    before = {path.name: path.read_bytes() for path in model.path.iterdir()}
    with pytest.raises(FormatError, match=f"{place}: the model's card in it can't be read: "):
        model.checkpoints.resume(model.path)
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == before


def test_a_delta_of_another_name_is_not_taken_for_a_number(model: Model) -> None:
    (model.deltas / "last.delta").write_bytes(b"")
    model.learn(1)
    with pytest.raises(HashembError, match=r"last\.delta: not a delta of a trainer, whose names are numbers"):
        model.checkpoints.take(model.table, model.card)
    model.table.close()
