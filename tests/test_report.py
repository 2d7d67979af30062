"""The report is complete, states what is unknown, is readable without its figures, and is a single file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import cli
from hashemb.ctr.report import gather
from hashemb.ctr.report.facts import evaluate
from hashemb.ctr.training import load_model

pytest.importorskip("pyarrow")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The contents of a page: its elements, correctly nested, its text and its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.problems += [f"<{tag}> never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes another element at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def cell(self, row: str, column: int = 1) -> str:
        return next(line[column] for table in self.tables for line in table if line and line[0] == row)


def write_clicks(path: Path, start: int, stop: int, bad: int = -1) -> Path:
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 1.2, 60)
    lines = ["click,user,site <a>"]
    for i in range(start, stop):
        user, site = (i * 7919) % 60, (i * 104729) % 13
        label = "?" if i == bad else int((i * 2654435761 % 1000) / 1000 < 1 / (1 + np.exp(1 - effects[user])))
        lines.append(f"{label},{user},s{site}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two models on the same clicks, one of them with hardly any rows, and make clicks to test them on."""
    directory = tmp_path_factory.mktemp("runs")
    train = str(write_clicks(directory / "train.csv", 0, 6000, bad=17))
    write_clicks(directory / "test.csv", 6000, 9000)
    for name, rows in (("big", "4096"), ("small", "16")):
        command = ["train", train, "-t", str(directory / name), "--rank", "2", "--rows", rows]
        assert cli.main([*command, "--initial-accumulator", "0.1"]) == 0
    return directory


def report(runs: Path, tmp_path: Path, *arguments: str, model: str = "big") -> tuple[str, Page]:
    target = tmp_path / "out.html"
    assert cli.main(["report", str(runs / model), *arguments, "-o", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.problems == []
    return text, page


def test_a_report_on_data(runs: Path, tmp_path: Path, capsys: Any) -> None:
    test, small = str(runs / "test.csv"), str(runs / "small")
    text, page = report(runs, tmp_path, test, "--user", "user", "--compare", small)
    assert capsys.readouterr().out == f"{tmp_path / 'out.html'}\n"
    model, card = load_model(runs / "big")
    with model.table:
        found = evaluate(model, card, [test], user="user")
    assert page.cell("AUC") == f"{found.metrics.auc:.5f}"
    assert page.cell("GAUC") == f"{found.gauc:.5f}"
    assert page.cell("log loss (nats)") == f"{found.metrics.logloss:.6f}"
    assert page.cell("examples") == "3,000"
    assert page.cell("examples", 2) == "5,999", "while learning"
    assert [page.cell(field.field) for field in found.collisions] == ["60", "13"]
    assert page.cell("user", 2) == str(found.collisions[0].sharing_keys)
    memory = {point.name: point for point in gather(runs / "big", [test], compare=[small]).memory}
    assert memory["big"].auc > memory["small"].auc + 0.05
    assert page.cell("small", 4) == f"{memory['small'].auc:.5f}"
    assert page.cell(str(runs / "train.csv"), 3) == "1", "bad rows"
    assert "train.csv:19: label must be 0 or 1, found" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


def test_a_report_without_data(runs: Path, tmp_path: Path) -> None:
    """The report is made from the directory alone, with what was recorded while learning."""
    text, page = report(runs, tmp_path)
    assert page.cell("examples") == "5,999"
    rows = next(table for table in page.tables if table[0] == ["examples", "since last", "log loss", "NE", "AUC"])
    assert [row[0] for row in rows[1:]] == ["1,024", "2,048", "4,096", "5,999"]
    assert "GAUC" not in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert "Which fields they are in is known only of data" in text


def test_a_report_on_a_model_that_has_learned_nothing(tmp_path: Path) -> None:
    hashemb.create(tmp_path / "t", num_embeddings=100, embedding_dim=3).close()
    (tmp_path / "empty.csv").write_text("click,user\n")
    cli.main(["train", str(tmp_path / "empty.csv"), "-t", str(tmp_path / "t")])
    text, page = report(tmp_path, tmp_path, model="t")
    assert "The model has learned nothing yet" in text
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_a_report_on_data_without_a_good_row(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("click,user,site <a>\nx,1,s1\n")
    text, page = report(runs, tmp_path, str(tmp_path / "bad.csv"))
    assert "1 bad row left out" in text
    assert page.cell("examples") == "0"


def test_the_page_is_complete_and_loads_nothing(runs: Path, tmp_path: Path) -> None:
    text, page = report(runs, tmp_path, str(runs / "test.csv"), "--compare", str(runs / "small"))
    assert not re.search(r"<script|<link|<img|<iframe|@import|\bsrc=", text)
    remote = [url for url in re.findall(r"(?:href|url)[=(][\"']?([^\"')]+)", text) if not url.startswith("#")]
    assert remote == []
    identifiers = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers)), "an identifier is given twice"
    used = set(re.findall(r"(?:href=\"#|url\(#|aria-labelledby=\")([^\")]+)", text))
    assert used <= set(identifiers)
    assert len(text) < 300_000


def test_the_page_can_be_read_without_seeing_it(runs: Path, tmp_path: Path) -> None:
    """The page has a language, one h1 and headings in order, a caption per table and a description per figure."""
    text, page = report(runs, tmp_path, str(runs / "test.csv"))
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert "width=device-width" in str(tags["meta"]["content"])
    headings = [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1"] + ["h2"] * 8
    assert sum(tag == "caption" for tag, _ in page.tags) == len(page.tables) > 5
    figures = [attributes for tag, attributes in page.tags if tag == "figure"]
    assert all(len(str(attributes["aria-label"])) > 60 for attributes in figures)
    assert len(figures) == sum(tag == "svg" for tag, _ in page.tags)
    assert "prefers-color-scheme: dark" in text


def test_pictures_take_the_colours_of_the_page(runs: Path, tmp_path: Path) -> None:
    """Figures set no colours of their own: black lines would be invisible on a dark page."""
    text, _ = report(runs, tmp_path, str(runs / "test.csv"), "--compare", str(runs / "small"))
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        colours = set(re.findall(r"(?:fill|stroke|color): ([^;\"]+)", svg))
        assert colours <= {"none", "currentColor", "var(--first)", "var(--second)"}
        assert not re.search(r"<svg[^>]* (?:width|height)=", svg), "a picture is as wide as the page"


def test_names_are_escaped(runs: Path, tmp_path: Path) -> None:
    text, page = report(runs, tmp_path, str(runs / "test.csv"))
    assert "site <a>" in [row[0] for table in page.tables for row in table if row]
    assert "<a>" not in text


def test_the_same_facts_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    first, _ = report(runs, tmp_path, str(runs / "test.csv"))
    second, _ = report(runs, tmp_path, str(runs / "test.csv"))
    assert first == second


def test_a_corrected_model_is_reported_corrected(runs: Path, tmp_path: Path) -> None:
    command = ["train", str(runs / "train.csv"), "-t", str(tmp_path / "m"), "--rank", "0", "--rows", "4096"]
    assert cli.main([*command, "--negative-rate", "0.2", "--lr", "0.2", "--batch-size", "50", "--passes", "3"]) == 0
    facts = gather(tmp_path / "m", [runs / "test.csv"])
    assert facts.evaluation is not None
    assert facts.evaluation.metrics.calibration == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "nobody", "TEST"], "no field 'nobody' to tell users by; the model has user, site <a>"),
        (["--user", "user"], "GAUC by 'user' needs data to score"),
        (["UNLABELLED"], "no labels to compare predictions with"),
        (["--compare", "NOTHING"], "no model here"),
    ],
)
def test_what_cannot_be_reported(runs: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    unlabelled = tmp_path / "unlabelled.csv"
    unlabelled.write_text("user,site <a>\n1,s1\n")
    names = {"TEST": runs / "test.csv", "UNLABELLED": unlabelled, "NOTHING": tmp_path}
    arguments = [str(names.get(argument, argument)) for argument in arguments]
    assert cli.main(["report", str(runs / "big"), *arguments, "-o", str(tmp_path / "out.html")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_the_page_goes_beside_the_model_by_default(runs: Path, capsys: Any) -> None:
    assert cli.main(["report", str(runs / "big")]) == 0
    assert capsys.readouterr().out == f"{runs / 'big.html'}\n"
    assert (runs / "big.html").exists()
