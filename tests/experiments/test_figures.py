"""scores.png and budgets.png: what they show is what results.json has."""

import matplotlib.figure
import numpy as np
import pytest

from experiments.jobs.results import Row
from experiments.reporting import budgets, scores
from experiments.reporting.tables import Results


@pytest.fixture
def drawn(monkeypatch):
    """The axes of figures that are drawn, by what they measure."""
    found: dict[str, matplotlib.axes.Axes] = {}

    def keep(figure):
        figure.canvas.draw()
        for axes in figure.axes:
            label = axes.get_xlabel() or axes.get_ylabel()
            found[axes.get_ylabel() if "epoch" in label else label] = axes
        return b""

    for module in (scores, budgets):
        monkeypatch.setattr(module, "as_png", keep)
    return found


def row(label, method, arm, epoch, weights, accuracy, ece=()):
    loss = [1 - value for value in accuracy]
    return Row(label, method, arm, epoch, weights, accuracy, loss, loss, list(ece))


ROWS = [
    row("SGD", "sgd", "sgd", 4, "iterate", [0.80, 0.82], [0.1, 0.2]),
    row("SWA", "swa", "swa2", 4, "average", [0.81, 0.85], [0.1, 0.1]),
    row("no pass", "swa", "swa2", 4, "average, no BatchNorm pass", [0.1, 0.2], [0, 0]),
    row("EMA", "ema", "swa2", 4, "ema:0.9", [0.82, 0.83], [0.2, 0.3]),
    row("last iterate (1)", "sgd", "swa2", 4, "iterate", [0.1, 0.3], [0.4, 0.5]),
]


def test_scores_shows_every_seed_and_tells_what_is_off_the_axis(drawn):
    scores.plot_scores(Results("digits", ROWS, []))
    assert list(drawn) == [
        "test accuracy (%)",
        "test loss (nats)",
        "calibration error (%)",
    ]
    accuracy, loss, error = drawn.values()
    shown = [0, 1, 3, 4]  # no ablation
    labels = [text.get_text() for text in accuracy.get_yticklabels()]
    assert labels == [ROWS[n].label for n in shown]
    near = shown[:3]
    for axes, values, scale, rows in (
        (accuracy, [r.accuracy for r in ROWS], 100, near),
        (loss, [r.loss for r in ROWS], 1, near),
        (error, [r.ece for r in ROWS], 100, shown),
    ):
        dots, bars = axes.lines[::2], axes.lines[1::2]
        low, high = axes.get_xlim()
        for place, (n, dot, bar) in enumerate(zip(rows, dots, bars, strict=True)):
            assert np.all((low < dot.get_xdata()) & (dot.get_xdata() < high))
            expected = scale * np.asarray(values[n])
            np.testing.assert_allclose(dot.get_xdata(), expected)
            np.testing.assert_allclose(bar.get_xdata(), [expected.mean()] * 2)
            assert set(dot.get_ydata()) == {place}
    # The best mean is 83, half are at least 82.5: the last iterate is too far away.
    assert 20 < accuracy.get_xlim()[0] < 80
    assert [text.get_text() for text in accuracy.texts] == [" ◀ 20"]
    assert [text.get_text() for text in loss.texts] == ["0.8 ▶ "]


def test_scores_without_calibration_has_two_panels(drawn):
    rows = [row(*("SGD", "sgd", "sgd", 4, "iterate"), [0.5])]
    scores.plot_scores(Results("digits", rows, []))
    assert list(drawn) == ["test accuracy (%)", "test loss (nats)"]


def test_budgets_is_a_curve_through_all_and_a_marker_for_each(drawn):
    rows = [
        row(f"SGD, {n} epochs", "sgd", f"sgd{n}", n, "iterate", [n / 20, n / 25])
        for n in (5, 10)
    ]
    for n in (5, 10):
        place = "constant", n
        rows += [
            row(f"last iterate (1), {n} epochs", "sgd", *place, "iterate", [0.1, 0.1]),
            row(f"mean of every epoch, {n} epochs", "swa", *place, "average", [0.2]),
            row(f"EMA 0.9, {n} epochs", "ema", *place, "ema:0.9", [n / 15, n / 15]),
        ]
    budgets.plot_budgets(Results("any_budget", rows, []))
    axes = drawn["test accuracy (%)"]
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["SGD: a run for each", "EMA 0.9, one run"]
    for handle, means, line in zip(
        handles, ([22.5, 45.0], [100 / 3, 200 / 3]), ("None", "-"), strict=True
    ):
        assert list(handle[0].get_xdata()) == [5, 10]
        assert list(handle[0].get_ydata()) == pytest.approx(means)
        assert handle[0].get_linestyle() == line
    title = axes.figure.get_suptitle()
    assert title == "any_budget: one run of 10 epochs, or 15 epochs in single runs"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["5", "10"]
