"""What a job leaves behind: the results table, results.json and the curves."""

import dataclasses
import io
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
import rich.table

from experiments import processes
from experiments.configs import Config
from experiments.evaluate import Evaluation


@dataclasses.dataclass
class Row:
    """One line of the results: a method, scored with every seed.

    The fields are those of a row in results.json; accuracies are fractions in
    [0, 1] and losses are in nats.
    """

    method: str  # "sgd" or "swa"
    swa_epochs: int  # length of the averaging window; 0 for SGD
    bn_recomputed: bool  # whether the BatchNorm pass ran on the averaged weights
    accuracy: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """The row's name in tables."""
        if self.method == "sgd":
            return "SGD"
        plural = "s" * (self.swa_epochs > 1)
        suffix = "" if self.bn_recomputed else ", no BatchNorm pass"
        return f"SWA, last {self.swa_epochs} epoch{plural}{suffix}"

    def add(self, evaluation: Evaluation) -> None:
        """Append the next seed's scores."""
        self.accuracy.append(evaluation.accuracy)
        self.loss.append(evaluation.loss)


@dataclasses.dataclass(frozen=True)
class Curves:
    """The first seed's history, for the plot; accuracies are fractions."""

    epochs: int
    swa_epochs: int
    sgd_rates: np.ndarray  # [total steps]
    swa_rates: np.ndarray  # [total steps]
    sgd: list[float]  # test accuracy after each epoch
    swa_iterates: list[float]  # of the SWA arm's own weights, after each epoch
    swa_average: list[float]  # of the average, after each epoch of the window


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """Format the mean ± sample standard deviation; one value has only a mean."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table_cells(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Label, accuracy in percent and loss of each row, as text."""
    return [
        (
            row.label,
            mean_and_std([100 * value for value in row.accuracy], 2),
            mean_and_std(row.loss, 4),
        )
        for row in rows
    ]


def make_table(config: Config, rows: Sequence[Row]) -> rich.table.Table:
    """The results as a table for the terminal."""
    table = rich.table.Table(
        title=f"{config.name}: test split, {config.epochs} epochs,"
        f" mean ± sample std of {config.seeds} seed{'s' * (config.seeds > 1)}"
    )
    table.add_column("method")
    table.add_column("accuracy (%)", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    for cells in table_cells(rows):
        table.add_row(*cells)
    return table


def make_markdown(rows: Sequence[Row]) -> str:
    """The results as a Markdown table."""
    lines = ["| Method | Test accuracy (%) | Test loss |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(cells)} |" for cells in table_cells(rows)]
    return "\n".join(lines) + "\n"


def config_dict(config: Config) -> dict[str, Any]:
    """The configuration in JSON's types."""
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(config).items()
    }


def open_log(config: Config) -> TextIO:
    """Open metrics.jsonl for writing; in all processes but the main one, nothing."""
    if not processes.is_main():
        return open(os.devnull, "w")
    config.workdir.mkdir(parents=True, exist_ok=True)
    return (config.workdir / "metrics.jsonl").open("w")


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Of the processes of a job, only the main one writes.
    """
    if not processes.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, path)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def write_report(config: Config, rows: Sequence[Row], curves: Curves) -> None:
    """Write results.json, results.md and curves.png into the work directory."""
    results = {
        "config": config_dict(config),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(config.workdir / "results.json", results)
    write_atomic(config.workdir / "results.md", make_markdown(rows).encode())
    write_atomic(config.workdir / "curves.png", plot_curves(config, curves))


def plot_curves(config: Config, curves: Curves) -> bytes:
    """Draw both arms' learning rates and test accuracies; return a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.0), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    grey, blue, orange = "#6b7280", "#1f77b4", "#d9480f"
    window_start = curves.epochs - curves.swa_epochs

    steps = len(curves.sgd_rates) / curves.epochs
    position = np.arange(len(curves.sgd_rates)) / steps
    top.plot(position, curves.sgd_rates, color=blue)
    top.plot(position, curves.swa_rates, color=orange)
    top.set_ylabel("learning rate")
    top.set_ylim(bottom=0)

    epochs = np.arange(1, curves.epochs + 1)
    averaged = epochs[window_start:]
    bottom.plot(
        epochs,
        100 * np.array(curves.swa_iterates),
        color=grey,
        linewidth=1,
        label="SWA's iterates",
    )
    bottom.plot(epochs, 100 * np.array(curves.sgd), color=blue, label="SGD, cosine")
    bottom.plot(
        averaged,
        100 * np.array(curves.swa_average),
        color=orange,
        marker="o",
        markersize=3.5,
        label="SWA: their average so far",
    )
    bottom.set_ylabel("test accuracy (%)")
    bottom.set_xlabel("epoch")
    bottom.set_xlim(0, curves.epochs)
    bottom.set_ylim(*_accuracy_limits(curves))
    # Between the panels, where no curve can run into it.
    bottom.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    for axes in (top, bottom):
        axes.axvspan(window_start, curves.epochs, color=orange, alpha=0.07, lw=0)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    top.annotate(
        "averaging",
        ((window_start + curves.epochs) / 2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        color=orange,
    )
    figure.suptitle(f"SGD and SWA on {config.name} (first seed)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _accuracy_limits(curves: Curves) -> tuple[float, float]:
    """Percent limits that show the end of training, not the climb from 10 %.

    Weights at a high learning rate are now and then far off; a fifth of the later
    epochs may leave the plot.
    """
    late = slice(curves.epochs // 4, None)
    low = min(
        *curves.swa_average,
        float(np.quantile(curves.sgd[late], 0.2)),
        float(np.quantile(curves.swa_iterates[late], 0.2)),
    )
    best = max(*curves.sgd, *curves.swa_average, *curves.swa_iterates)
    margin = 0.1 * max(best - low, 0.005)
    return max(0.0, 100 * (low - margin)), min(100.0, 100 * (best + margin))
