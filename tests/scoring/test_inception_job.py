"""The evaluation job with Inception, real images in a folder and no downloads: a rehearsal of FID."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import tiny
from inception_weights import weights
from PIL import Image

from pipeline import storage
from pipeline.evaluation import plan, rows, timing
from pipeline.evaluation.artist import Artist
from pipeline.recipe import Recipe
from pipeline.scoring import inception, instruments
from pipeline.scoring.tally import Sight
from pipeline.workflow import drawing, evaluate


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny teacher of 32x32 images, and four photographs to compare it with."""
    folder = tmp_path_factory.mktemp("inception")
    made = tiny.tiny(folder, "var", **tiny.IMAGES)
    (folder / "real").mkdir()
    for i, size in enumerate([(32, 32), (40, 64), (70, 80), (33, 50)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "real" / f"{i}.png")
    settings = {"features": "inception", "flavour": "pytorch-fid", "inception": "formula"}
    settings |= {"reference": str(folder / "real"), "samplers": [{"name": "Autoregressive"}], "count": 3, "batch": 2}
    return changed(made, **settings)


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    return dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, **settings))


def test_a_rehearsal_ends_with_a_report_that_says_so(
    recipe: Recipe, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actors are given the weights; what they and the network of this process see is the same, bit for bit."""
    monkeypatch.setattr(inception, "formula", weights)
    monkeypatch.setattr(timing, "time_alone", lambda plan, *rest: timing.time_samplers(plan, *rest[:2], threads=1))
    seen: list[Any] = []  # instead of roots of 2048 x 2048, which take seconds
    monkeypatch.setattr(rows, "frechet", lambda a, b: seen.append((a, b)) or 7.0)
    text = evaluate.evaluate(recipe)
    assert "FD of a random Inception (not FID)" in text
    results = storage.read_json(storage.join(recipe.report_uri, "report.json"))
    made = results["made"]
    assert (made["flavour"], made["weights"]) == ("pytorch-fid", "by formula, random: nothing here is FID")
    assert made["features SHA-256"] == {"inception": "formula", "flavour": "pytorch-fid"}
    assert (made["reference"]["images"], made["reference"]["statistics"]) == (4, "made here")
    markdown = storage.read_bytes(storage.join(recipe.report_uri, "report.md")).decode()
    assert "It is not FID: a rehearsal" in markdown

    images = instruments.real(recipe.evaluate, 32)
    assert images is not None
    real = Sight.of(images[:4][0], instruments.features(recipe.evaluate, "cpu", weights())).features.astype(np.float64)
    with np.load(storage.local(storage.join(recipe.report_uri, "reference.npz"))) as file:
        assert np.array_equal(file["mu"], real.mean(0))
        assert str(file["flavour"]) == "pytorch-fid"
        assert int(file["count"]) == 4

    # a report on the statistics that this one leaves: nothing is drawn again, and the distance is the same
    monkeypatch.setattr(drawing, "parts_of", lambda *args: pytest.fail("drawn again"))
    again = changed(recipe, reference=storage.join(recipe.report_uri, "reference.npz"))
    evaluate.evaluate(again)
    other = storage.read_json(storage.join(recipe.report_uri, "report.json"))
    assert [row["name"] for row in other["rows"]] == ["teacher, AR"], "no real images, no row of theirs"
    assert (other["rows"][0]["score"], other["made"]["reference"]["count"]) == (7.0, 4)
    (sampled, reference), second = seen
    np.testing.assert_allclose(reference[1], np.cov(real.T), atol=1e-9)
    for one, two in zip((*sampled, *reference), (*second[0], *second[1]), strict=True):
        assert np.array_equal(one, two)


def test_what_cannot_serve_is_refused_before_anything_is_drawn(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.cluster, "connect", lambda recipe: pytest.fail("sampling began"))
    np.savez(tmp_path / "bare.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "empty").mkdir()
    for settings, sentence in [
        ({"inception": str(tmp_path / "none.pth")}, r"evaluate.inception .*none.pth is not there; fetch"),
        ({"inception": str(tmp_path / "bare.npz")}, r"has SHA-256 .*, not 6726825d0af5"),
        ({"reference": str(tmp_path / "none")}, r"evaluate.reference .*none is not there"),
        ({"reference": str(tmp_path / "empty")}, "is a folder without images"),
        ({"reference": str(tmp_path / "bare.npz")}, "was made with trained weights and evaluate.inception is random"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
            evaluate.evaluate(changed(recipe, **settings))
        assert "\n" not in str(caught.value)


def test_actors_share_the_weights(recipe: Recipe, ray_cluster: None) -> None:
    """The network's tensors are the very memory of Ray's object store, nowhere a copy."""
    shared = ray.put(weights())
    network: Any = Artist(plan.prepare(recipe), [], None, shared).network.network
    arrays = ray.get(shared)
    assert network.head.data_ptr() == arrays["fc.weight"].ctypes.data
    own = network.layers.state_dict()
    assert sum(own[name].data_ptr() == arrays[name].ctypes.data for name in own) == len(own) == 564
