"""width.png: the loss around solutions, as `experiments.jobs.width` measured it."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.reporting.style import (
    BLUE,
    GREY,
    ORANGE,
    as_png,
    new_figure,
    with_grid,
)

# Of the plain solution, SWA's, and its last iterate: told apart without colour too.
MARKS = ((BLUE, "o"), (ORANGE, "^"), (GREY, "s"))


def read_width(path: pathlib.Path) -> dict[str, Any] | None:
    """What was measured, if the file is there and whole."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    parts = {"labels", "distance", "rays", "segment", "plane"}
    return found if isinstance(found, dict) and found.keys() >= parts else None


def _caption(data: dict[str, Any]) -> str:
    """Of what it is made, which is not all that the tables are made of."""
    if "examples" not in data:  # measured by an earlier version
        return ""
    train, test = (data["examples"][split] for split in ("train", "test"))
    return (
        f"\n{train:,} training and {test:,} test examples; BatchNorm recomputed at each"
        " point"
    )


def plot_width(data: dict[str, Any], name: str) -> bytes:
    """Draw width.png from what was measured on an experiment; return a PNG."""
    figure = new_figure(13, 8.4)
    axes = figure.subplots(2, 3, width_ratios=(1, 1, 1.5))
    kinds = {"train_loss": "train loss (nats)", "test_error": "test error (%)"}
    if data.get("scored_by") == "loss":
        kinds = {"train_loss": "train loss (nats)", "test_loss": "test loss (nats)"}
    for row, (kind, title) in zip(axes, kinds.items(), strict=True):
        rays, segment, plane = row
        _plot_rays(rays, data, kind)
        rays.set_ylabel(title)
        _plot_segment(segment, data, kind)
        _plot_plane(plane, data, kind, title, figure)
        with_grid(rays, segment)
    axes[0, 0].set_title("along random rays from each", fontsize="medium")
    axes[0, 1].set_title("on the line through both", fontsize="medium")
    axes[0, 2].set_title("on the plane through all three", fontsize="medium")
    axes[1, 0].set_xlabel("distance from the solution")
    axes[1, 1].set_xlabel(f"distance from {data['labels'][0]}")
    labelled = zip(MARKS, data["labels"], strict=True)
    marks = [_mark(axes[0, 0], *each) for each in labelled]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Around the solutions on {name} (first seed){_caption(data)}")
    return as_png(figure)


def _mark(axes: Any, mark: tuple[str, str], label: str) -> Any:
    """How a solution is drawn in all panels, for the legend."""
    colour, marker = mark
    return axes.plot([], [], color=colour, marker=marker, linewidth=2, label=label)[0]


def _point(axes: Any, mark: tuple[str, str], x: float, y: float) -> None:
    colour, marker = mark
    axes.plot([x], [y], marker, color=colour, markeredgecolor="white", markersize=9)


def _plot_rays(axes: Any, data: dict[str, Any], kind: str) -> None:
    radii = data["rays"]["radii"]
    for (colour, marker), surface in zip(
        MARKS, data["rays"]["surfaces"].values(), strict=False
    ):
        values = np.array(surface[kind])
        axes.plot(radii, values.T, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(radii, values.mean(axis=0), color=colour, marker=marker, linewidth=2)


def _plot_segment(axes: Any, data: dict[str, Any], kind: str) -> None:
    positions, values = data["segment"]["positions"], data["segment"][kind]
    axes.plot(positions, values, color="0.3")
    for mark, x in zip(MARKS, (0.0, data["distance"]), strict=False):
        _point(axes, mark, x, float(np.interp(x, positions, values)))


def _plot_plane(
    axes: Any, data: dict[str, Any], kind: str, title: str, figure: Any
) -> None:
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
        figure.colorbar(filled, ax=axes, format="%.3g", label=title)
    for mark, (x, y) in zip(MARKS, plane["points"], strict=True):
        _point(axes, mark, x, y)
    axes.set_aspect("equal")
    plain, swa, _ = data["labels"]
    axes.set_xlabel(f"distance along {plain} to {swa}")
    axes.set_ylabel("distance across")
