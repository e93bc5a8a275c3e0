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

    A dot is a seed, a bar the mean over seeds. Ablations are left to the table. A row
    that would squeeze the others into a corner is told as its mean, at the edge: one
    that is further from the best than four times the spread of the better half.
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
        upwards = index == 0  # accuracy
        shown = _shown(values, upwards)
        seen = [value for seeds in shown for value in seeds]
        margin = 0.05 * (max(seen) - min(seen)) or 1e-3
        low, high = min(seen) - margin, max(seen) + margin
        each.set_xlim(low, high)
        for place, (row, seeds) in enumerate(zip(rows, values, strict=True)):
            mean, colour = statistics.fmean(seeds), _COLOURS.get(row.method, GREEN)
            if seeds in shown:
                each.plot(seeds, [place] * len(seeds), "o", c=colour, alpha=0.4, ms=4)
                ends = [place - 0.3, place + 0.3]
                each.plot([mean, mean], ends, color=colour, lw=2.5)
            else:
                edge, side, text = (
                    (low, "left", f" ◀ {mean:.4g}")
                    if upwards
                    else (high, "right", f"{mean:.4g} ▶ ")
                )
                each.text(edge, place, text, va="center", ha=side, fontsize="small")
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


def _shown(values: list[list[float]], upwards: bool) -> list[list[float]]:
    """Of the rows, those that an axis has room for.

    Args:
        values: Of each row, with every seed.
        upwards: Whether larger ones are better.
    """
    means = sorted(map(statistics.fmean, values), reverse=upwards)
    best, middle = means[0], means[len(means) // 2]
    spread = max(abs(middle - best), 1e-3 * abs(best), 1e-9)
    return [v for v in values if abs(statistics.fmean(v) - best) <= 4 * spread]
