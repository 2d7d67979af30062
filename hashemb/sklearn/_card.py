"""Read and write `estimator.json`, which describes a fitted estimator in the directory of its table.

With this card another process needs only the path. The card is written before the first update and never changes.
Directories that `hashemb train` created have a `model.json` instead, which is read as well.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb._text import shown
from hashemb.ctr._json_values import as_list, as_object, as_text, as_whole, parse_file
from hashemb.ctr._replacing import replacing
from hashemb.ctr.training import MODEL_FILE, read_card
from hashemb.errors import FormatError
from hashemb.sklearn._kinds import check_kinds
from hashemb.sklearn._layout import Layout

__all__ = ["ESTIMATOR_FILE", "EstimatorCard"]

ESTIMATOR_FILE = "estimator.json"
_FORMAT = 1
_DTYPE = re.compile(r"[<>=|](?:[biuf][1248]|f16|U[1-9][0-9]{0,4}|O)")
#: Names of estimators, by kind of model and whether it has factors.
_ESTIMATORS = {
    ("factorization_machine", False): "HashedLogisticRegression",
    ("factorization_machine", True): "HashedFMClassifier",
    ("field_weighted_fm", True): "HashedFwFMClassifier",
}


@dataclass(frozen=True)
class EstimatorCard:
    """Description of a fitted estimator, without its table and its hyper-parameters.

    Attributes
    ----------
    estimator : str
        Name of the class; for a `hashemb train` model that has no class, a description of the model.
    classes : ndarray, shape (2,)
        Labels, sorted; the model predicts the probability of the second one.
    layout : Layout
        The columns of the input.
    """

    estimator: str
    classes: npt.NDArray[Any]
    layout: Layout

    def as_json(self) -> str:
        """Return the text that `read` parses; raise a TypeError for labels that JSON cannot represent."""
        try:
            values = json.dumps(self.classes.tolist())
        except TypeError as error:
            raise TypeError(
                f"labels {self.classes.tolist()!r} cannot be written to {ESTIMATOR_FILE} ({error}): map them to "
                "strings, integers, floats or booleans"
            ) from error
        content = {
            "format": _FORMAT,
            "estimator": self.estimator,
            "classes": json.loads(values),
            "classes_dtype": self.classes.dtype.str,
            "num_columns": self.layout.num_columns,
            "named": self.layout.named,
            "columns": self.layout.kinds,
        }
        return json.dumps(content, indent=1) + "\n"

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Write the card to a table's directory, atomically and durably."""
        text = self.as_json()
        with replacing(Path(directory, ESTIMATOR_FILE)) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> EstimatorCard:
        """Read the card from a table's directory, or make one from its `model.json`.

        Raises
        ------
        FileNotFoundError
            The directory has neither file.
        FormatError
            The file is not a card, or has a newer format.
        """
        try:
            return parse_file(Path(directory, ESTIMATOR_FILE), "an estimator's card", cls._parse)
        except FileNotFoundError:
            return cls._of_model(directory)

    @classmethod
    def _parse(cls, values: Any) -> EstimatorCard:
        card = as_object(values, "the card")
        version = as_whole(card.get("format"), "format", 1)
        if version > _FORMAT:
            raise ValueError(f"format {version} is newer than this version reads ({_FORMAT})")
        num_columns = as_whole(card.get("num_columns"), "num_columns", 1)
        kinds = None if card.get("columns") is None else check_kinds(card["columns"])
        for name in kinds or ():
            as_text(name, "a column", encodable=True)
        if kinds is not None and len(kinds) != num_columns:
            raise ValueError(f"{len(kinds)} columns, expected {num_columns}")
        layout = Layout(num_columns, kinds, card.get("named") is True)
        return cls(as_text(card.get("estimator"), "estimator"), _parse_classes(card), layout)

    @classmethod
    def _of_model(cls, directory: str | os.PathLike[str]) -> EstimatorCard:
        try:
            card = read_card(directory)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{os.fspath(directory)}: no estimator here: neither {ESTIMATOR_FILE} nor {MODEL_FILE} found"
            ) from None
        if not card.schema:
            raise FormatError(f"{os.fspath(directory)}: {MODEL_FILE} names no fields yet: the model has seen no data")
        estimator = _ESTIMATORS.get((card.kind, card.rank > 0), card.description)
        return cls(estimator, np.array([0, 1]), Layout(len(card.schema), check_kinds(dict(card.schema)), named=True))


def _parse_classes(card: dict[str, Any]) -> npt.NDArray[Any]:
    """Parse two labels of a type that `as_json` writes."""
    values, dtype = as_list(card.get("classes"), "classes"), as_text(card.get("classes_dtype"), "classes_dtype")
    texts = [value for value in values if isinstance(value, str)]
    if len(values) != 2 or not all(isinstance(value, (str, int, float)) for value in values) or len(texts) == 1:
        raise ValueError(f"classes must be two labels of one type, found {shown(values)}")
    if not _DTYPE.fullmatch(dtype) or (dtype[1] in "UO") < bool(texts):
        raise ValueError(f"classes_dtype {shown(dtype)} does not fit the labels {shown(values)}")
    try:
        classes = np.array(values, dtype=np.dtype(dtype))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"classes_dtype {shown(dtype)} can't hold the labels {shown(values)}: {error}") from error
    if not classes[0] < classes[1]:
        raise ValueError(f"classes must be sorted and differ, found {shown(values)}")
    return classes
