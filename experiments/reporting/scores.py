"""scores.png: what every method scored with every seed, from results.json."""

import statistics

from experiments.reporting.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    as_png,
    new_figure,
    with_grid,
)
from experiments.reporting.tables import Results
from experiments.training.plans import ABLATIONS

_COLOURS = {"sgd": BLUE, "swa": ORANGE}


def plot_scores(results: Results) -> bytes:
    """Draw accuracy, loss and calibration of every row; return a PNG.

    A dot is a seed, a bar the mean over seeds. Ablations are left to the table. What
    would squeeze the others into a corner is told as a number at the edge: no axis is
    wider than four times the spread of the better half.
    """
    rows = [row for row in results.rows if row.weights not in ABLATIONS]
    panels = {
        "test accuracy (%)": [[100 * value for value in r.accuracy] for r in rows],
        "test loss (nats)": [row.loss for row in rows],
    }
    if all(row.ece for row in rows):
        panels["calibration error (%)"] = [[100 * v for v in row.ece] for row in rows]
    figure = new_figure(3.2 * len(panels) + 1.6, 0.34 * len(rows) + 1.3)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for index, (each, (title, values)) in enumerate(
        zip(axes, panels.items(), strict=True)
    ):
        for place, (row, seeds) in enumerate(zip(rows, values, strict=True)):
            colour = _COLOURS.get(row.method, GREEN)
            mean = statistics.fmean(seeds)
            each.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.4, ms=4)
            each.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, lw=2.5)
        low, high = _limits(values, upwards=index == 0)
        each.set_xlim(low, high)
        for place, seeds in enumerate(values):
            mean = statistics.fmean(seeds)
            if mean < low:
                each.text(low, place, f" ◀ {mean:.4g}", va="center", fontsize="small")
            elif mean > high:
                each.text(
                    high,
                    place,
                    f"{mean:.4g} ▶ ",
                    va="center",
                    ha="right",
                    fontsize="small",
                )
        each.set_xlabel(title)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    with_grid(*axes)
    number = len(rows[0].accuracy)
    figure.suptitle(f"{results.name}: {number} seed{'s' * (number > 1)}, bar: mean")
    averaging = {row.arm for row in rows if row.weights != "iterate"}
    for row, label in zip(rows, axes[0].get_yticklabels(), strict=True):
        averaged = row.weights == "iterate" and row.arm in averaging
        label.set_color(GREY if averaged else "black")
    return as_png(figure)


def _limits(values: list[list[float]], upwards: bool) -> tuple[float, float]:
    """Where an axis begins and ends.

    Args:
        values: Of each row, with every seed.
        upwards: Whether larger ones are better.
    """
    means = sorted(map(statistics.fmean, values), reverse=upwards)
    best, middle = means[0], means[len(means) // 2]
    spread = max(abs(middle - best), 1e-3 * abs(best), 1e-9)
    every = [value for seeds in values for value in seeds]
    low, high = min(every), max(every)
    if upwards:
        low = max(low, best - 4 * spread)
    else:
        high = min(high, best + 4 * spread)
    margin = 0.05 * (high - low) or 1e-3
    return low - margin, high + margin
