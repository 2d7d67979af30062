"""The benchmarks of models: what they measure, the data that each tool gets, and failures on wrong counts."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from bench import compression, compression_report, ctr_data, ctr_peers, ctr_sides, report
from bench.compression import Sized, Variant
from bench.ctr_data import Rows
from bench.ctr_sides import FM, LR, Ours, Peer, VowpalWabbit
from bench.harness import Mismatch, Settings
from bench.process import Usage, run_command, usable_cpus
from hashemb.ctr.data import open_reader

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- processes ----


def test_a_process_is_charged_for_its_own_memory() -> None:
    ballast = np.ones(40 << 20, np.uint8)  # memory of this process, which the child must not inherit
    peak = {}
    for name, mib in (("small", 0), ("large", 200)):
        command = [sys.executable, "-S", "-c", f"x = b'1' * ({mib} << 20); print(len(x))"]
        usage = run_command(command, cpus=usable_cpus(1), timeout_s=60)
        assert usage.output == f"{mib << 20}\n"
        assert 0 < usage.cpu_s < usage.wall_s + 0.1
        peak[name] = usage.peak_bytes
    assert peak["small"] < ballast.nbytes
    assert peak["large"] - peak["small"] == pytest.approx(200 << 20, rel=0.05)


def test_a_process_runs_on_the_cpus_that_it_is_given() -> None:
    cpus = usable_cpus(1)
    command = [sys.executable, "-S", "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    assert json.loads(run_command(command, cpus=cpus, timeout_s=60).output) == cpus
    assert cpus[0] in os.sched_getaffinity(0)


def test_a_process_that_fails_says_so() -> None:
    program = "import sys; print('no such thing'); sys.exit(3)"
    with pytest.raises(RuntimeError, match=r"status 3: no such thing"):
        run_command([sys.executable, "-S", "-c", program], cpus=usable_cpus(1), timeout_s=60)


# ---- data ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return ctr_data.generate(tmp_path_factory.mktemp("rows"), 500, seed=3)


def test_every_format_has_the_same_rows(rows: Rows) -> None:
    keys = {}
    for path in (rows.text, rows.parquet):
        with open_reader(path, batch_size=500) as reader:
            (batch,) = reader
        assert np.array_equal(batch.labels, rows.labels())
        keys[path.suffix] = batch.keys
    assert np.array_equal(keys[".tsv"], keys[".parquet"])
    found = list(ctr_peers.examples(str(rows.vw)))
    assert [label for label, _ in found] == rows.labels().tolist()
    missing = keys[".tsv"] == null_keys()
    assert [len(tokens) for _, tokens in found] == (39 - missing.sum(axis=1)).tolist()
    for field, letter in enumerate(ctr_data.NAMESPACES):  # as many distinct values, at the same places
        ours = [key for key, absent in zip(keys[".tsv"][:, field], missing[:, field], strict=True) if not absent]
        theirs = [token for _, tokens in found for token in tokens if token[0] == letter]
        assert len(set(zip(ours, theirs, strict=True))) == len(set(ours)) == len(set(theirs))


def null_keys() -> Any:
    import hashemb

    return np.array([hashemb.hash_keys([None], field=name)[0] for name in ctr_data.CRITEO_SCHEMA])


def test_a_line_of_vowpal_wabbits_text(tmp_path: pathlib.Path) -> None:
    line = ["1", "33", "", "-1", *["0"] * 10, "68fd1e64", *["", "80e26c9b"] * 12, ""]
    rows = Rows(tmp_path, 1)
    rows.text.write_text("\t".join(line) + "\n")
    ctr_data.write_vw(rows)
    text = rows.vw.read_text()
    assert text.startswith("1 |a 12 |c -1 |d 0 |e 0 ")  # floor(ln(33)²) = 12, and a missing value is left out
    assert "|n 68fd1e64 |p 80e26c9b |r 80e26c9b" in text
    assert text.count("|") == 39 - 14


def test_the_head_of_the_rows(rows: Rows) -> None:
    part = rows.head(37)
    assert np.array_equal(part.labels(), rows.labels()[:37])
    assert part.vw.read_text().splitlines() == rows.vw.read_text().splitlines()[:37]
    with open_reader(part.parquet) as reader:
        assert sum(len(batch.keys) for batch in reader) == 37


def test_the_best_possible_loss_is_that_of_the_truth(rows: Rows) -> None:
    assert 0.3 < ctr_data.best_logloss(rows) < 0.5


def test_ids_tell_namespaces_apart_and_keep_zero_for_what_is_missing() -> None:
    found = ctr_peers.ids([["a 1", "b 1"], ["b 1"]], 1000)
    assert found.shape == (2, 39)
    assert found[0, 0] != found[0, 1] == found[1, 1] > 0
    assert found[1, 0] == 0 == found[:, 2:].max()


# ---- sides ----


def test_a_side_that_learned_something_else_fails_the_bench(rows: Rows) -> None:
    positives = round(float(rows.labels().sum()))
    ours, vw, peer = Ours("hashemb", LR, "hashemb"), VowpalWabbit("VW", LR, "VW LR"), Peer("sklearn", LR, "sklearn")

    def usage(output: str) -> Usage:
        return Usage(1.0, 1.0, 1, output)

    ours.check(rows, usage(f"500 examples, {positives} positive."))
    vw.check(rows, usage(f"number of examples = 500\nweighted label sum = {2 * positives - 500}.000000\n"))
    peer.check(rows, usage(f'a line\n{{"examples": 500, "positives": {positives}}}\n'))
    for side, output in (
        (ours, f"499 examples, {positives} positive."),
        (vw, f"number of examples = 500\nweighted label sum = {2 * positives - 498}.000000"),
        (peer, f'{{"examples": 500, "positives": {positives + 1}}}'),
    ):
        with pytest.raises(Mismatch, match=f"{side.name}: learned"):
            side.check(rows, usage(output))
    with pytest.raises(Mismatch, match="no "):
        ours.check(rows, usage("nothing"))


def test_vowpal_wabbit_gets_all_pairs_of_namespaces(rows: Rows) -> None:
    command = VowpalWabbit("VW", FM, "VW FM").command(rows, pathlib.Path("out"), "--coin", score=True)
    assert command[command.index("--lrqfa") + 1] == f"{ctr_data.NAMESPACES}15"
    assert len(set(ctr_data.NAMESPACES)) == 39
    assert {"--coin", "-p"} <= set(command)
    assert "--lrqfa" not in VowpalWabbit("VW", LR, "VW LR").command(rows, pathlib.Path("out"), "-l 0.2")


def test_sides_say_what_they_need() -> None:
    assert [side.name for side in ctr_sides.sides(smoke=False)][:1] == ["hashemb"]
    assert all(side.package for side in ctr_sides.sides(smoke=False) if not side.group.startswith("hashemb"))


def test_scikit_learn_is_scored_before_it_learns(rows: Rows, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "p.npy"
    settings = {"learning_rate": "constant", "eta0": 0.01}
    spec = {"peer": "sklearn", "path": str(rows.vw), "settings": settings, "predictions": str(target)}
    assert ctr_peers.main(spec) == {"examples": 500, "positives": round(float(rows.labels().sum()))}
    assert np.array_equal(np.load(target), np.full(500, 0.5, np.float32)), "a chunk is 1,000 rows"


# ---- memory versus quality ----


@pytest.mark.parametrize("data", ["Frappe", "generated"])
@pytest.mark.parametrize("num_values", [5382, 10**7])
def test_no_variant_takes_more_than_it_is_given(data: str, num_values: int) -> None:
    reference, *others = compression.variants(data)
    for scale in compression.SCALES:
        budget = num_values * reference.row_bytes // scale
        points = [compression.sized(variant, budget, num_values) for variant in others]
        assert any(point is not None for point in points)
        for point in points:
            if point is not None:
                assert budget - 2 * point.variant.row_bytes < point.bytes <= budget
                assert 0 <= point.own < point.rows
    base = compression.sized(reference, 0, num_values)
    assert base == Sized(reference, num_values + 2, num_values + 1)


def test_the_reference_gives_each_value_a_row(tmp_path: pathlib.Path) -> None:
    frequent = np.arange(100, dtype=np.uint64)
    point = compression.sized(Variant(compression.REFERENCE, rank=2), 0, 100)
    assert point is not None
    with compression.model_of(point, frequent, 0, str(tmp_path)) as model:
        store: Any = model.table
        assert np.unique(store.rows(frequent)).size == 100
        assert store.num_own_rows == 101


def test_tables_and_picture_of_the_results(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    data = compression.load_stream(300, str(tmp_path))
    results = compression.stream_results(data, (1, 10), Settings(smoke=True, directory=str(tmp_path)), str(tmp_path))
    source, page = tmp_path / "out.json", tmp_path / "page.md"
    machine = dict.fromkeys(("cpu", "family_model_stepping", "usable_cores", "l3", "isa", "kernel", "python"), "")
    file = {"machine": {**machine, "versions": {}}, "results": [result.as_dict() for result in results]}
    source.write_text(json.dumps(file))
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    compression_report.main([str(source), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert "old" not in text
    assert "| one hash |" in text
    assert f"{data.num_values:,} distinct values" in text
    assert (tmp_path / "page.svg").stat().st_size > 1000
