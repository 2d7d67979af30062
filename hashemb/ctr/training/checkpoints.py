"""Checkpoints, from which training resumes after a kill without losing or repeating examples, and deltas for serving.

A checkpoint is a snapshot of the model's table that also holds the model's card at that time, and with it the positions
in the data. A delta is published only when the snapshot that it leads up to is on disk, so a trainer that restores the
snapshot never reverts what a server has already received.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import hashemb
from hashemb.ctr.training.model_dir import MODEL_FILE, ModelCard, card_values, parse_card, read_card, write_card
from hashemb.errors import FormatError, HashembError

__all__ = ["Checkpoints"]

KEPT = 2
PENDING = ".pending"


class Checkpoints:
    """Checkpoints of one model.

    Parameters
    ----------
    directory : path
        Directory for snapshots, one subdirectory each; the last two are kept. It is created if it does not exist.
    deltas : path, optional
        Directory for deltas, for `hashemb follow`; the first delta holds the whole table. It is created if it does not
        exist.
    """

    def __init__(self, directory: str | os.PathLike[str], deltas: str | os.PathLike[str] | None = None) -> None:
        self.directory = Path(directory)
        self.deltas = None if deltas is None else Path(deltas)
        for path in (self.directory, self.deltas):
            if path is not None:
                path.mkdir(parents=True, exist_ok=True)

    def take(self, table: hashemb.EmbeddingTable, card: ModelCard) -> None:
        """Take a checkpoint, unless this step has one, and publish the delta that leads up to it.

        Raises
        ------
        OSError, HashembError
            The disk is full, or the deltas in the directory belong to another table.
        """
        place = self.directory / f"step-{table.step:015d}"
        if place.exists():
            return
        pending = self._export(table)
        extra = {"model": json.loads(json.dumps(card_values(card))), "delta": pending and pending.stem}
        table.snapshot(place, extra=extra)
        if pending:
            os.rename(pending, pending.with_suffix(""))
        for old in self._places()[:-KEPT]:
            shutil.rmtree(old)

    def _export(self, table: hashemb.EmbeddingTable) -> Path | None:
        if self.deltas is None:
            return None
        published = sorted(self.deltas.glob("*.delta"))
        if published and not re.fullmatch("[0-9]{1,18}", published[-1].stem):
            raise HashembError(f"{published[-1]}: not a delta of a trainer, whose names are numbers; move it elsewhere")
        number = int(published[-1].stem) + 1 if published else 0
        pending = self.deltas / f"{number:09d}.delta{PENDING}"
        pending.unlink(missing_ok=True)
        table.export_delta(published[-1] if published else None, pending)
        return pending

    def _places(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("step-*") if path.is_dir())

    def resume(self, model: str | os.PathLike[str]) -> int | None:
        """Restore the model to its last checkpoint if its table differs from its card, as after a kill.

        No process may have the table open for writing.

        Returns
        -------
        int or None
            The model's current step if it was restored, else None.

        Raises
        ------
        HashembError
            There is no checkpoint to restore, or it is damaged.
        """
        places = self._places()
        last = hashemb.info(places[-1]).snapshot if places else None
        self._settle_pending(last.extra if last else {})
        if not Path(model, MODEL_FILE).exists() or _is_whole(model):
            return None
        if last is None or "model" not in last.extra:
            raise HashembError(f"{os.fspath(model)}: was killed, and {self.directory} holds no checkpoint of it")
        try:
            card = parse_card(last.extra["model"])
        except ValueError as error:
            raise FormatError(f"{places[-1]}: the model's card in it can't be read: {error}") from error
        aside = hashemb.restore(places[-1], model, replace=True)
        write_card(model, card)
        if aside:
            shutil.rmtree(aside)
        return last.step

    def _settle_pending(self, extra: dict[str, Any]) -> None:
        """Publish a pending delta if its snapshot was finished; else discard it, as its steps will be repeated."""
        for path in self.deltas.glob(f"*{PENDING}") if self.deltas else ():
            if path.stem == extra.get("delta"):
                os.rename(path, path.with_suffix(""))
            else:
                path.unlink()


def _is_whole(model: str | os.PathLike[str]) -> bool:
    """Return whether the table is clean and at the step that its card records."""
    info = hashemb.info(model)
    return info.clean and info.step == read_card(model).table_step
