"""Files of models, pages and predictions are replaced whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import hashemb
from hashemb.ctr._replacing import replacing


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_not_restored(tmp_path: Path) -> None:
    """Restoring a table copies the user's files, but no temporary one."""
    hashemb.create(tmp_path / "T", num_embeddings=10, embedding_dim=4).close()
    with hashemb.open(tmp_path / "T", mode="r+") as table:
        table.snapshot(tmp_path / "S")
    (tmp_path / "T" / "model.json").write_text("{}")
    with replacing(tmp_path / "T" / "model.json") as temporary:
        left = temporary.with_name(temporary.name.replace(".tmp", "0.tmp"))
        left.write_text("half")
        temporary.write_text("{}")
    hashemb.restore(tmp_path / "S", tmp_path / "T", replace=True)
    assert (tmp_path / "T" / "model.json").read_text() == "{}"
    assert not (tmp_path / "T" / left.name).exists()
