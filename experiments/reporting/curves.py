"""curves.png: learning rates and test curves of a job, from its log alone."""

from typing import Any

import numpy as np

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
from experiments.runtime.metrics import LoggedArm, ParsedLog
from experiments.training.plans import longest_average

_PLAIN = (BLUE, GREEN, PURPLE, GREY)  # arms that do not average, in order


def plot_curves(log: ParsedLog) -> bytes:
    """Draw the first seed's learning rates and test scores; return a PNG.

    As in the figure of Izmailov et al., arXiv:1803.05407: the average's score in bold
    where there is one, and that of the weights it averages thin beside it. Images are
    scored by accuracy, text by loss. The log may be that of a job at work.
    """
    text = log.scored_by == "loss"
    figure = new_figure(7.5, 6.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    shown: list[float] = []
    plain = iter(_PLAIN * len(log.arms))
    # Of several averages the longest: the others would hide it.
    longest = longest_average(log.arms)
    for arm in log.arms:
        averages = arm.averages_from is not None
        if averages and arm is not longest:
            continue
        colour = ORANGE if averages else next(plain)
        _plot_rates(top, log, arm, colour)
        shown += _plot_tests(bottom, log, arm, colour, text)
    top.set_ylabel("learning rate")
    top.set_ylim(bottom=0)
    bottom.set_ylabel("test loss (nats)" if text else "test accuracy (%)")
    bottom.set_xlabel("epoch")
    bottom.set_xlim(0, max(arm.epochs for arm in log.arms))
    if shown:
        bottom.set_ylim(*_limits(shown, text))
        # Between the panels, where no curve can run into it.
        bottom.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
            ncols=3,
            frameon=False,
            fontsize="small",
        )
    for axes in (top, bottom):
        if longest is not None:
            start = longest.averages_from - 1
            axes.axvspan(start, longest.epochs, color=ORANGE, alpha=0.07, lw=0)
    with_grid(top, bottom)
    figure.suptitle(f"{log.config['name']} (first seed)")
    return as_png(figure)


def _plot_rates(axes: Any, log: ParsedLog, arm: LoggedArm, colour: str) -> None:
    steps = log.of("step", arm.name, 0)
    epochs = [arm.first_epoch + line["step"] / arm.steps_per_epoch for line in steps]
    axes.plot(epochs, [line["learning_rate"] for line in steps], color=colour)


def _plot_tests(
    axes: Any, log: ParsedLog, arm: LoggedArm, colour: str, text: bool
) -> list[float]:
    """Plot an arm's scores; return those that the axes should show."""
    averages = arm.averages_from is not None
    tests = log.of("test", arm.name, 0)
    shown: list[float] = []
    for weights in ("iterate", "average"):
        lines = [line for line in tests if line["weights"] == weights]
        epochs = [line["epoch"] for line in lines]
        values = [line["loss"] if text else 100 * line["accuracy"] for line in lines]
        if not values:
            continue
        thin = averages and weights == "iterate"
        axes.plot(
            epochs,
            values,
            color=GREY if thin else colour,
            linewidth=1 if thin else 1.8,
            marker="o" if weights == "average" else None,
            markersize=3.5,
            label=f"{arm.label}: iterates" if thin else arm.label,
        )
        # Not the climb of the first quarter; weights at a high learning rate are now
        # and then far off, so a fifth of what is left may leave the plot.
        last = arm.epochs
        late = [v for e, v in zip(epochs, values, strict=True) if e > last // 4]
        late = late or values
        worst = float(np.quantile(late, 0.8 if text else 0.2))
        shown += [worst, min(late) if text else max(late)]
        if weights == "average":
            shown += values
    return shown


def _limits(shown: list[float], text: bool) -> tuple[float, float]:
    low, high = min(shown), max(shown)
    margin = 0.1 * max(high - low, 0.02 if text else 0.5)
    top = high + margin
    return max(0.0, low - margin), top if text else min(100.0, top)
