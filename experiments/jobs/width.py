"""The loss around solutions: along rays, on the segment and on the plane through them.

The pictures of wide optima in Izmailov et al., arXiv:1803.05407: figure 4 (rays in
random directions), figure 5 (the segment that joins SGD's and SWA's solutions) and
figures 1 and 3 (a plane through three points). BatchNorm is fitted to each point.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.jobs.run import final_state
from experiments.runtime.files import write_json
from experiments.runtime.workdir import Workdir
from experiments.training.scoring import Scorer, averaged_variables
from experiments.training.step import CompiledArm

PyTree = Any
# From parameters to what `Surface` has of them.
Scores = tuple[float, float, float]
ScoreFn = Callable[[PyTree], Scores]


class Surface(NamedTuple):
    """What was measured at some points; the lists are nested alike."""

    train_loss: list[Any]  # nats
    test_loss: list[Any]  # nats
    test_error: list[Any]  # percent


def measure_width(
    directory: Workdir,
    plain: CompiledArm,
    swa: CompiledArm,
    scorer: Scorer,
    scored_by: str,
) -> None:
    """Write width.json from the checkpoints of the first seed's finished runs.

    Args:
        directory: Of the job.
        plain: Whose solution stands beside SWA's.
        swa: The arm that averages.
        scorer: On the examples behind each point.
        scored_by: What the figure shows of the test split: accuracy, or loss.

    Raises:
        StorageError: A run's final checkpoint cannot be read.
    """
    plain_state = final_state(directory, plain, 0)
    swa_state = final_state(directory, swa, 0)
    solutions = {
        plain.arm.label: plain_state.params,
        "SWA": averaged_variables(swa_state)[0],
        "SWA's last iterate": swa_state.params,
    }

    def score(params: PyTree) -> Scores:
        try:
            network = scorer.fitted(params, plain_state.batch_stats)
        except FloatingPointError:
            return math.nan, math.nan, math.nan  # far out: a hole in the figure
        train, test = (scorer.score(network, split) for split in ("train", "test"))
        return train.loss, test.loss, 100 * (1 - test.accuracy)

    found = measure(score, solutions)
    about = {"scored_by": scored_by, "examples": scorer.examples}
    write_json(directory.width, {**about, **found})


def random_directions(size: int, count: int, seed: int) -> np.ndarray:
    """Directions uniform on the unit sphere, [count, size] float32."""
    found = np.random.default_rng(seed).standard_normal((count, size), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def plane_basis(points: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """An orthonormal basis of the plane through three points.

    Its origin is the first point, its first axis points to the second.

    Args:
        points: [3, size].

    Returns:
        The axes [2, size], and the points in them, [3, 2]. None where the points lie on
        a line.
    """
    origin, *others = points.astype(np.float64)
    u, v = (other - origin for other in others)
    scale = float(np.linalg.norm(u))
    u = u / scale if scale else u
    v = v - (v @ u) * u
    height = float(np.linalg.norm(v))
    if scale == 0 or height <= 1e-9 * max(scale, 1e-30):
        return None
    axes = np.stack([u, v / height])
    return axes, (points - origin) @ axes.T


def measure(
    score: ScoreFn,
    solutions: dict[str, PyTree],
    seed: int = 0,
    num_rays: int = 5,
    num_radii: int = 8,
    grid: int = 11,
) -> dict[str, Any]:
    """Score the neighbourhood of three solutions.

    Args:
        score: Of parameters; BatchNorm statistics are its own business.
        solutions: Parameters by label: SGD's, SWA's, and a third point of the plane.
        seed: Of the directions.
        num_rays: Directions from each of the first two.
        num_radii: Points on a ray after its start. The longest is four times the
            distance between the first two solutions.
        grid: Points on each side of the plane.

    Returns:
        All of it in JSON's types: what `plot_width` draws. The plane is None where the
        solutions lie on a line, as an average of one epoch does with its last iterate.
    """
    labels = list(solutions)
    first = ravel_pytree(solutions[labels[0]])
    unravel = first[1]
    points = np.stack([np.asarray(ravel_pytree(p)[0]) for p in solutions.values()])
    distance = float(np.linalg.norm(points[1] - points[0]))

    def at(flat: np.ndarray) -> Scores:
        return score(unravel(jnp.asarray(flat, jnp.float32)))

    radii = np.linspace(0, 4 * distance, num_radii + 1)
    directions = random_directions(points.shape[1], num_rays, seed)
    rays = {
        label: _surface([[at(w + r * d) for r in radii] for d in directions])
        for label, w in zip(labels[:2], points, strict=False)
    }
    positions = np.linspace(-0.5, 1.5, 2 * grid - 1)
    segment = [at(points[0] + t * (points[1] - points[0])) for t in positions]
    return {
        "labels": labels,
        "distance": distance,
        "rays": {
            "radii": radii.tolist(),
            "surfaces": {label: ray._asdict() for label, ray in rays.items()},
        },
        "segment": {
            "positions": (distance * positions).tolist(),
            **_surface(segment)._asdict(),
        },
        "plane": _measure_plane(at, points, grid),
    }


def _measure_plane(
    at: Callable[[np.ndarray], Scores],
    points: np.ndarray,
    grid: int,
) -> dict[str, Any] | None:
    basis = plane_basis(points)
    if basis is None:
        return None
    axes, coordinates = basis
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    margin = 0.35 * (high - low).max()
    xs, ys = (
        np.linspace(a - margin, b + margin, grid)
        for a, b in zip(low, high, strict=True)
    )
    plane = [[at(points[0] + x * axes[0] + y * axes[1]) for x in xs] for y in ys]
    return {
        "x": xs.tolist(),
        "y": ys.tolist(),
        "points": coordinates.tolist(),
        **_surface(plane)._asdict(),
    }


def _surface(scores: Sequence[Any]) -> Surface:
    return Surface(*np.moveaxis(np.asarray(scores, np.float64), -1, 0).tolist())
