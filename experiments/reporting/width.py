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

COLOURS = (BLUE, ORANGE, GREY)


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
    figure = new_figure(10.5, 6.6)
    axes = figure.subplots(2, 3)
    for row, (kind, title) in enumerate(
        (("train_loss", "train loss (nats)"), ("test_error", "test error (%)"))
    ):
        rays, segment, plane = axes[row]
        _plot_rays(rays, data, kind)
        rays.set_ylabel(title)
        _plot_segment(segment, data, kind)
        _plot_plane(plane, data, kind, figure)
        with_grid(rays, segment)
    axes[0, 0].set_title("along random rays", fontsize="medium")
    axes[0, 1].set_title("on the line through both", fontsize="medium")
    axes[0, 2].set_title("on the plane through three", fontsize="medium")
    axes[1, 0].set_xlabel("distance from the solution")
    axes[1, 1].set_xlabel(f"distance from {data['labels'][0]}")
    figure.suptitle(f"Around the solutions on {name} (first seed){_caption(data)}")
    return as_png(figure)


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
