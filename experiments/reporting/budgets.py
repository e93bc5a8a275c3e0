"""budgets.png: one run read at any moment, and a run for each budget."""

import statistics
from collections.abc import Callable
from typing import Any

from experiments.jobs.results import Row
from experiments.reporting.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    as_png,
    new_figure,
    with_grid,
)
from experiments.reporting.tables import Results

_CURVES = (ORANGE, GREEN, PURPLE, "#0b7285")


def plot_budgets(results: Results) -> bytes:
    """Draw accuracy and loss against epochs of training; return a PNG.

    A curve is one run, whose averages were read at each budget; a marker is a run that
    was trained for that budget alone. Bars are sample deviations over seeds.
    """
    figure = new_figure(9.0, 4.2)
    scores: dict[str, Callable[[Row], list[float]]] = {
        "test accuracy (%)": lambda row: [100 * value for value in row.accuracy],
        "test loss (nats)": lambda row: row.loss,
    }
    axes = figure.subplots(1, 2)
    for each, (title, values) in zip(axes, scores.items(), strict=True):
        _panel(each, results.rows, values)
        each.set_ylabel(title)
        each.set_xlabel("epochs of training")
        each.set_xscale("log")
        epochs = sorted({row.epoch for row in results.rows})
        each.set_xticks(epochs, list(map(str, epochs)))
        each.minorticks_off()
    with_grid(*axes)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    total = sum({row.arm: row.epoch for row in results.rows if _alone(row)}.values())
    longest = max(row.epoch for row in results.rows)
    figure.suptitle(
        f"{results.name}: one run of {longest} epochs, or {total} epochs in single runs"
    )
    return as_png(figure)


def _alone(row: Row) -> bool:
    """Whether its run was trained for one budget."""
    return row.arm.startswith("sgd")


def _panel(axes: Any, rows: list[Row], values: Callable[[Row], list[float]]) -> None:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kind = row.arm.rstrip("0123456789") if row.arm != "constant" else row.arm
        groups.setdefault((kind, row.weights), []).append(row)
    colours = iter(_CURVES * len(groups))
    for (kind, weights), members in groups.items():
        if kind == "constant" and weights in ("iterate", "average"):
            continue  # far below; they are in the table
        label = members[0].label.rpartition(", ")[0]
        style = {"sgd": ("s", BLUE), "cooldown": ("^", GREY)}.get(kind)
        seeds = [values(row) for row in members]
        axes.errorbar(
            [row.epoch for row in members],
            [statistics.fmean(each) for each in seeds],
            [statistics.stdev(each) if len(each) > 1 else 0.0 for each in seeds],
            color=style[1] if style else next(colours),
            marker=style[0] if style else "o",
            markersize=6 if style else 3.5,
            linestyle="none" if style else "-",
            capsize=2,
            elinewidth=1,
            label=f"{label}: a run for each" if style else f"{label}, one run",
        )
