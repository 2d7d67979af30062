"""Every benchmark runs at smoke size and checks its results, so that none rots; absent peers are skipped."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

import hashemb
from bench import __main__ as program
from bench import against, embedding, harness, report, workload
from bench.harness import Clock, Mismatch, Settings
from bench.sides import HashembSide, NumpySide
from bench.workload import Case

# Deprecations in the imports of peers must not fail our tests.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def keep_threads() -> Any:
    before = hashemb.get_num_threads()
    yield
    hashemb.set_num_threads(before)


@pytest.mark.parametrize("name", program.BENCHES)
def test_smoke(name: str, tmp_path: pathlib.Path, keep_threads: None) -> None:
    target = tmp_path / "out.json"
    assert program.main([name, "--smoke", "--json", str(target), "--dir", str(tmp_path)]) == 0
    written = json.loads(target.read_text())
    assert written["machine"]["isa"] in ("baseline", "avx2", "avx512")
    for result in written["results"]:
        ours = result["sides"][0]
        assert ours["median_ratio"] == 1.0
        assert all(side["median_ns"] > 0 for side in result["sides"])
        assert result["checks"] or result["case"]["what"] == "create and open"
    if name not in ("roofline", "hash", "kv", "out_of_core"):  # the others need only hashemb
        assert written["results"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"], "tables left behind"


def test_report_writes_tables_between_the_marks(tmp_path: pathlib.Path, keep_threads: None) -> None:
    target, readme = tmp_path / "out.json", tmp_path / "README.md"
    program.main(["lookup", "--smoke", "--json", str(target), "--dir", str(tmp_path), "--sides", "NumPy"])
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(target), "--readme", str(readme), "--no-pictures"])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| **hashemb** |" in text
    assert "| NumPy |" in text


def test_keys_of_rows_hash_back_to_their_rows(tmp_path: pathlib.Path) -> None:
    rows = np.arange(1 << 14)
    case = Case(rows=1 << 14, dim=4)
    table = workload.make_table(str(tmp_path), case)
    assert np.array_equal(table.rows(workload.keys_of_rows(rows, case.rows)), rows)
    assert table.stats(exact=True).rows_touched == case.rows
    workload.drop_table(table)


def test_zipf_ranks_follow_the_power_law() -> None:
    n = 1000
    ranks = workload.zipf_ranks(np.random.default_rng(1).random(200_000), n, 1.2)
    counts = np.bincount(ranks.astype(np.int64), minlength=n)
    edges = np.arange(1, n + 2) ** -0.2
    expected = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1]) * ranks.size
    assert ranks.max() < n
    assert np.abs(counts[:20] - expected[:20]).max() < 5 * np.sqrt(expected[:20].max())


class _Wrong(NumpySide):
    """A side with a fault: it skips the last vector of the batch, or the last distinct row of an update."""

    def __init__(self, *args: Any, spoil: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spoil = spoil

    def lookup(self, prepared: Any) -> Any:
        vectors = super().lookup(prepared)
        if self.spoil == "lookup":
            vectors.reshape(-1)[0] += 1e-6
        return vectors

    def update(self, prepared: Any, result: Any) -> None:
        row = prepared.reshape(-1)[0]
        kept = self.weight[row].copy()
        super().update(prepared, result)
        if self.spoil == "update":
            self.weight[row] = kept


@pytest.mark.parametrize("spoil", ["lookup", "update"])
def test_a_side_with_wrong_results_fails_the_bench(spoil: str, tmp_path: pathlib.Path) -> None:
    case = Case(rows=1 << 14, dim=4, batch=16, optimizer="adagrad")
    table = workload.make_table(str(tmp_path), case)
    sides = [HashembSide(table, case, train=True), _Wrong(table, case, train=True, spoil=spoil)]
    with pytest.raises(Mismatch, match="NumPy"):
        embedding.check_sides(sides, case, train=True)
    workload.drop_table(table)


def test_ratios_are_a_peers_time_over_ours() -> None:
    class Fixed:
        def __init__(self, name: str, seconds: float, share: float = 1.0) -> None:
            self.name, self.group, self.seconds_each, self.share = name, name, seconds, share

        def prepare(self, batch: int) -> int:
            return batch

        def run(self, prepared: int, clock: Clock) -> None:
            clock.seconds["work"] = clock.seconds.get("work", 0.0) + self.seconds_each

    sides = [Fixed("hashemb", 1.0), Fixed("slow", 3.0), Fixed("half of the work", 1.0, share=0.5)]
    rows = harness.measure(sides, int, units=1000, repeats=3, inner=2)
    assert [row["median_ratio"] for row in rows] == [1.0, 3.0, 2.0]
    assert [row["median_ns"] for row in rows] == [1e6, 3e6, 2e6]
    assert harness.best_by_group(rows)["slow"]["ratio_of_medians"] == 3.0


def test_default_grid_is_the_acceptance_point() -> None:
    cases = list(embedding.grid(Settings(), Case(rows=1 << 23, dim=16), ["rowwise_adagrad"]))
    assert {(c.dim, c.threads) for c in cases} == {(16, 1), (16, 2), (64, 1), (64, 2)}
    assert {(c.rows, c.num_keys, c.distribution) for c in cases} == {(1 << 23, 4096 * 26, "uniform")}


def test_a_build_against_itself(tmp_path: pathlib.Path) -> None:
    target, here = tmp_path / "out.json", str(pathlib.Path(hashemb.__file__).parents[1])
    assert program.main(["--smoke", "--json", str(target), "--dir", str(tmp_path), "--against", here]) == 0
    results = json.loads(target.read_text())["results"]
    assert {result["bench"] for result in results} == set(against.NAMES)
    for result in results:
        assert [side["name"] for side in result["sides"]] == [harness.OURS, against.OTHER]
        assert "by phase lookup" in result["sides"][1]["note"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"], "tables left behind"


def test_a_directory_without_a_build_is_refused(tmp_path: pathlib.Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        program.main(["overhead", "--smoke", "--against", str(tmp_path)])
    assert "has no build in place" in capsys.readouterr().err
