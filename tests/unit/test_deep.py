"""DeepFM and DCN-V2: the formulas, term by term, and learning of an interaction that a linear model can't learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb

torch = pytest.importorskip("torch")
from hashemb.ctr.models import FactorizationMachine  # noqa: E402
from hashemb.ctr.models.deep import DCNv2, DeepFM, predict_proba  # noqa: E402


def create(path: Path, dim: int, **options: Any) -> hashemb.EmbeddingTable:
    return hashemb.create(
        path,
        num_embeddings=2**16,
        embedding_dim=dim,
        optimizer=hashemb.Adagrad(lr=0.1),
        init=hashemb.Normal(0.1),
        **options,
    )


def random_keys(n: int, num_fields: int) -> Any:
    values = np.random.default_rng(0).integers(0, 50, (n, num_fields))
    return hashemb.hash_fields({str(i): values[:, i] for i in range(num_fields)})


def test_deepfm_is_a_factorisation_machine_beside_a_tower(tmp_path: Path) -> None:
    keys = random_keys(20, 3)
    with create(tmp_path / "t.emb", 1 + 4) as table:
        model = DeepFM(table, 3, hidden_units=(8,)).eval()
        machine = FactorizationMachine(table)
        tower = model.tower(torch.from_numpy(table.lookup(keys)[..., 1:]).flatten(1)).squeeze(1).detach().numpy()
        bias = table.lookup(hashemb.hash_keys(["bias"], field="hashemb.bias"))[0, 0]
        expected = machine.predict_logits(keys) - bias + tower
        np.testing.assert_allclose(model(keys).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_dcnv2_is_its_formula(tmp_path: Path) -> None:
    keys = random_keys(20, 3)
    with create(tmp_path / "t.emb", 4) as table:
        model = DCNv2(table, 3, num_cross_layers=2, hidden_units=(8,)).eval()
        first = table.lookup(keys).reshape(20, 12)
        crossed = first
        for layer in model.crosses:
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            crossed = first * (crossed @ weight.T + bias) + crossed
        deep = model.tower(torch.from_numpy(first)).detach().numpy()
        weight, bias = model.output.weight.detach().numpy()[0], model.output.bias.detach().numpy()[0]
        expected = np.concatenate([crossed, deep], axis=1) @ weight + bias
        np.testing.assert_allclose(model(keys).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def models(table: hashemb.EmbeddingTable) -> list[Any]:
    options: dict[str, Any] = {"hidden_units": (16,), "dropout": 0.1}
    return [
        DeepFM(table, 2, **options),
        DCNv2(table, 2, **options),
        DCNv2(table, 2, hidden_units=()),
        DeepFM(table, 2, hidden_units=(), batch_norm=False),
    ]


@pytest.mark.parametrize("number", range(4), ids=["DeepFM", "DCNv2", "crosses alone", "FM and a linear tower"])
def test_learns_an_interaction(tmp_path: Path, number: int) -> None:
    """Labels are the exclusive or of two features, and independent of each one alone."""
    torch.manual_seed(0)
    bits = np.random.default_rng(1).integers(0, 2, (512, 2))
    keys = hashemb.hash_fields({"a": bits[:, 0], "b": bits[:, 1]})
    labels = torch.from_numpy((bits[:, 0] ^ bits[:, 1]).astype(np.float32))
    with create(tmp_path / "t.emb", 9) as table:
        model = models(table)[number]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(model(keys), labels).backward()
            optimizer.step()
        assert table.step == 150
        assert model.training
        assert np.array_equal(predict_proba(model, keys) > 0.5, labels.numpy() > 0.5)
        assert model.training, "predict_proba puts the mode back"


def test_predictions_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    keys = random_keys(30, 2)
    with create(tmp_path / "t.emb", 9) as table:
        for model in models(table):
            whole, parts = predict_proba(model, keys), predict_proba(model, keys, batch_size=7)
            np.testing.assert_allclose(whole, parts, rtol=1e-5)
            assert predict_proba(model, keys[:0]).shape == (0,)
    assert whole.dtype == np.float32


def test_a_second_process_may_score(tmp_path: Path) -> None:
    """It opens the table read-only and loads the tower from a file."""
    keys = random_keys(30, 2)
    with create(tmp_path / "t.emb", 9) as table:
        model = DCNv2(table, 2, hidden_units=(16,))
        model(keys).sum().backward()
        torch.save(model.state_dict(), tmp_path / "tower.pt")
        with hashemb.open(table.path) as reader:
            served = DCNv2(reader, 2, hidden_units=(16,))
            served.load_state_dict(torch.load(tmp_path / "tower.pt"))
            assert np.array_equal(predict_proba(served, keys), predict_proba(model, keys))


def test_wrong_shapes(tmp_path: Path) -> None:
    with create(tmp_path / "t.emb", 9) as table:
        for model in models(table)[:2]:
            with pytest.raises(ValueError, match=r"\(n, 2\), one column per field, got \(5, 3\)"):
                model(random_keys(5, 3))
    with create(tmp_path / "one.emb", 1) as table, pytest.raises(ValueError, match="1 \\+ rank >= 2 elements"):
        DeepFM(table, 2)
