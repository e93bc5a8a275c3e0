import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments.config.schema import override
from experiments.data.splits import load_splits
from experiments.jobs import width as measuring
from experiments.jobs.main import Trainer
from experiments.jobs.width import measure, plane_basis, random_directions
from experiments.reporting.width import plot_width, read_width
from tests.helpers import run_job


def test_directions_are_uniform_unit_vectors():
    found = random_directions(3, 4000, seed=0)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # Uniform on the sphere: mean 0, and covariance 1/3 of the identity.
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(found.T @ found / 4000, np.eye(3) / 3, atol=0.03)
    np.testing.assert_array_equal(found, random_directions(3, 4000, seed=0))
    assert np.any(found != random_directions(3, 4000, seed=1))


def test_plane_basis_is_orthonormal_and_goes_through_the_points():
    points = np.random.default_rng(0).normal(size=(3, 7))
    found = plane_basis(points)
    assert found is not None
    axes, coordinates = found
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(points[0] + coordinates @ axes, points, atol=1e-12)
    np.testing.assert_allclose(coordinates[0], 0, atol=1e-12)
    assert coordinates[1, 1] == pytest.approx(0)


@pytest.mark.parametrize("last", [0.0, 2.0])
def test_points_on_a_line_have_no_plane(last):
    direction = np.arange(1.0, 5.0)
    points = np.stack([0 * direction, direction, last * direction])
    assert plane_basis(points) is None


@pytest.fixture
def measured():
    """A bowl: the loss is the squared distance from `sgd`, the error ten times that."""
    solutions = {
        "sgd": {"a": jnp.zeros((2, 2)), "b": jnp.zeros(1)},
        "swa": {"a": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "b": jnp.zeros(1)},
        "last": {"a": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "b": jnp.array([4.0])},
    }

    def score(params):
        loss = float(jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 2))
        return loss, 2 * loss, 10 * loss

    return measure(score, solutions, num_rays=2, num_radii=3, grid=5)


def test_measures_a_bowl(measured):
    assert measured["distance"] == pytest.approx(3)
    radii = np.array(measured["rays"]["radii"])
    np.testing.assert_allclose(radii, [0, 4, 8, 12])
    sgd, swa = measured["rays"]["surfaces"].values()
    np.testing.assert_allclose(sgd["train_loss"], [radii**2] * 2, rtol=1e-5)
    np.testing.assert_allclose(swa["train_loss"], np.array(swa["test_error"]) / 10)
    np.testing.assert_allclose(np.array(swa["train_loss"])[:, 0], 9, rtol=1e-5)
    segment = measured["segment"]
    expected = np.square(segment["positions"])
    np.testing.assert_allclose(segment["train_loss"], expected, rtol=1e-5, atol=1e-6)
    plane = measured["plane"]
    x, y = np.meshgrid(plane["x"], plane["y"])
    np.testing.assert_allclose(plane["train_loss"], x**2 + y**2, rtol=1e-4, atol=1e-5)
    expected = [[0, 0], [3, 0], [3, 4]]
    np.testing.assert_allclose(plane["points"], expected, atol=1e-6)
    # The plane shows all three points, with room around them.
    assert min(plane["x"]) < 0 < 3 < max(plane["x"])
    assert min(plane["y"]) < 0 < 4 < max(plane["y"])


def test_average_of_one_epoch_has_no_plane():
    """It is its last iterate; the other panels are there all the same."""
    average = {"a": jnp.ones(3)}
    solutions = {"sgd": {"a": jnp.zeros(3)}, "swa": average, "last": average}
    few = {"num_rays": 1, "num_radii": 2, "grid": 3}
    found = measure(lambda p: (float(p["a"].sum()), 1.0, 1.0), solutions, **few)
    assert found["plane"] is None
    assert_shows_both(plot_width(found, "a line"))


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_points_without_a_score_are_holes(measured, hole):
    for kind in ("train_loss", "test_error"):
        measured["plane"][kind][0][0] = hole
        measured["rays"]["surfaces"]["sgd"][kind][0][-1] = hole
    assert_shows_both(plot_width(measured, "a bowl with a hole"))
    for kind in ("train_loss", "test_error"):
        measured["plane"][kind] = [[hole] * 5] * 5
    assert_shows_both(plot_width(measured, "nothing but a hole"))


@pytest.mark.slow
def test_solutions_are_those_of_finished_runs(tiny, monkeypatch):
    config = override(tiny, seeds=1)
    run_job(config)
    found: dict[str, Any] = {}

    def looking(score, solutions):
        found.update(solutions=solutions, score=score)
        return {}

    monkeypatch.setattr(measuring, "measure", looking)
    splits = load_splits(config.data, ("train", "test"))
    made, limits = Trainer(config, splits), {"train": 16, "test": 16}
    arms = made.compile(config.plan["sgd"]), made.compile(config.plan["swa3"])
    measuring.measure_width(config.directory, *arms, made.scorer(limits), "accuracy")
    written = json.loads(config.directory.width.read_text())
    assert written == {"scored_by": "accuracy", "examples": limits}
    assert list(found["solutions"]) == ["SGD", "SWA", "SWA's last iterate"]
    for solution in found["solutions"].values():
        assert np.isfinite(found["score"](solution)).all()
    infinite = jax.tree.map(lambda x: x * np.inf, solution)
    assert np.isnan(found["score"](infinite)).all()


@pytest.mark.parametrize("content", [None, "", "[]", '{"labels": []}'])
def test_what_measure_did_not_write_is_measured_anew(tmp_path, measured, content):
    path = tmp_path / "width.json"
    if content is not None:
        path.write_text(content)
    assert read_width(path) is None
    path.write_text(json.dumps(measured))
    assert read_width(path) == measured


def test_plot_shows_both_solutions(measured):
    assert_shows_both(plot_width(measured, "a bowl"))


def assert_shows_both(content):
    pixels = matplotlib.image.imread(io.BytesIO(content), format="png")[..., :3]
    for colour in ((0x1F, 0x77, 0xB4), (0xD9, 0x48, 0x0F)):
        hits = np.all(np.abs(pixels - np.array(colour) / 255) < 0.02, axis=-1)
        halves = np.array_split(hits, 2)  # train loss above, test error below
        assert all(half.sum() > 100 for half in halves)
