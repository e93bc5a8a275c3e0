"""The loss around solutions: along rays, on the segment and on the plane through them.

The pictures of wide optima in Izmailov et al., arXiv:1803.05407: figure 4 (rays in
random directions), figure 5 (the segment that joins SGD's and SWA's solutions) and
figures 1 and 3 (a plane through three points).
"""

import io
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.style import BLUE, GREY, ORANGE, new_figure

PyTree = Any
# From parameters to the train loss in nats and the test error in percent.
ScoreFn = Callable[[PyTree], tuple[float, float]]

COLOURS = (BLUE, ORANGE, GREY)


class Surface(NamedTuple):
    """What was measured at some points; both lists are nested alike."""

    train_loss: list[Any]  # nats
    test_error: list[Any]  # percent


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

    def at(flat: np.ndarray) -> tuple[float, float]:
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
    at: Callable[[np.ndarray], tuple[float, float]], points: np.ndarray, grid: int
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
    losses, errors = np.moveaxis(np.asarray(scores, np.float64), -1, 0)
    return Surface(losses.tolist(), errors.tolist())


def read_width(path: pathlib.Path) -> dict[str, Any] | None:
    """What `measure` found, if the file is there and whole."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    parts = {"labels", "distance", "rays", "segment", "plane"}
    return found if isinstance(found, dict) and found.keys() >= parts else None


def plot_width(data: dict[str, Any], title: str) -> bytes:
    """Draw width.png from what `measure` found; return a PNG."""
    figure = new_figure(10.5, 6.6)
    axes = figure.subplots(2, 3)
    for row, (kind, name) in enumerate(
        (("train_loss", "train loss (nats)"), ("test_error", "test error (%)"))
    ):
        rays, segment, plane = axes[row]
        _plot_rays(rays, data, kind)
        rays.set_ylabel(name)
        _plot_segment(segment, data, kind)
        _plot_plane(plane, data, kind, figure)
        for each in (rays, segment):
            each.grid(color="0.9")
            each.set_axisbelow(True)
            each.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_title("along random rays", fontsize="medium")
    axes[0, 1].set_title("on the line through both", fontsize="medium")
    axes[0, 2].set_title("on the plane through three", fontsize="medium")
    axes[1, 0].set_xlabel("distance from the solution")
    axes[1, 1].set_xlabel(f"distance from {data['labels'][0]}")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plot_rays(axes: Any, data: dict[str, Any], kind: str) -> None:
    radii = data["rays"]["radii"]
    for colour, (label, surface) in zip(
        COLOURS, data["rays"]["surfaces"].items(), strict=False
    ):
        values = np.array(surface[kind])
        axes.plot(radii, values.T, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(radii, values.mean(axis=0), color=colour, linewidth=2, label=label)
    axes.legend(frameon=False)


def _plot_segment(axes: Any, data: dict[str, Any], kind: str) -> None:
    positions, values = data["segment"]["positions"], data["segment"][kind]
    axes.plot(positions, values, color="0.3")
    for colour, label, x in zip(
        COLOURS, data["labels"], (0.0, data["distance"]), strict=False
    ):
        y = np.interp(x, positions, values)
        axes.plot([x], [y], "o", color=colour, label=label)
    axes.legend(frameon=False)


def _plot_plane(axes: Any, data: dict[str, Any], kind: str, figure: Any) -> None:
    plane = data["plane"]
    if plane is None:
        axes.text(0.5, 0.5, "the three are on one line", ha="center", va="center")
        axes.set_axis_off()
        return
    values = np.ma.masked_invalid(np.array(plane[kind], np.float64))
    low, high = (values.min(), values.max()) if values.count() else (0.0, 0.0)
    # Finer near the bottom, where the solutions are.
    levels = low + (high - low) * np.linspace(0, 1, 16) ** 2
    if levels[-1] > levels[0]:
        filled = axes.contourf(plane["x"], plane["y"], values, levels, cmap="viridis_r")
        figure.colorbar(filled, ax=axes, format="%.3g")
    for colour, label, (x, y) in zip(
        COLOURS, data["labels"], plane["points"], strict=True
    ):
        axes.plot([x], [y], "o", color=colour, markeredgecolor="white", label=label)
    axes.set_aspect("equal")
    axes.legend(fontsize="small", loc="best")
