"""What a job found: the scores of every seed, tables, and paired tests."""

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import rich.table
import scipy.stats

from experiments.configs import from_json
from experiments.files import write_atomic, write_json
from experiments.plans import Arm, Weights
from experiments.settings import Config


class ConfigError(ValueError):
    """A work directory is not a job's; the message names the file."""


class Score(NamedTuple):
    """One network's scores."""

    accuracy: float  # on the test split, fraction in [0, 1]
    loss: float  # on the test split, in nats
    train_loss: float  # on the first training examples, not augmented, in nats


@dataclasses.dataclass
class Row:
    """One line of the results: which weights, scored with every seed.

    The fields are those of a row in results.json.
    """

    label: str
    method: str  # "sgd", whatever the optimizer of plain training, or "swa"
    arm: str
    epoch: int  # at whose end the weights were scored
    weights: Weights
    accuracy: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)

    def add(self, score: Score) -> None:
        """Append the next seed's scores."""
        self.accuracy.append(score.accuracy)
        self.loss.append(score.loss)
        self.train_loss.append(score.train_loss)


class Comparison(NamedTuple):
    """A paired t-test over seeds, which share weights and data order."""

    row: str
    against: str
    accuracy: float  # mean difference, in percentage points
    accuracy_t: float
    accuracy_p: float  # two-sided
    loss: float  # mean difference, in nats
    loss_t: float
    loss_p: float


def make_rows(arms: Sequence[Arm]) -> dict[tuple[str, str], Row]:
    """Empty rows in the order of the table, by (arm, label).

    Arms that average come last.
    """
    return {
        (arm.name, r.label): Row(r.label, r.method, arm.name, r.epoch, r.weights)
        for arm in sorted(arms, key=lambda arm: arm.averages_from is not None)
        for r in arm.readouts
    }


def compare(rows: Sequence[Row], arms: Sequence[Arm]) -> list[Comparison]:
    """Test each average against plain training as long, and against its parent."""
    by_name = {arm.name: arm for arm in arms}
    return [
        _test(row, other)
        for row, other in itertools.product(rows, rows)
        if row.weights == "average" and other.method == "sgd"
        if other.epoch == row.epoch or other.arm == by_name[row.arm].parent
        if len(row.accuracy) > 1
    ]


def _test(row: Row, other: Row) -> Comparison:
    percent = [100 * (a - b) for a, b in zip(row.accuracy, other.accuracy, strict=True)]
    nats = [a - b for a, b in zip(row.loss, other.loss, strict=True)]
    found = []
    for differences in (percent, nats):
        if len(set(differences)) == 1:  # no spread to test against
            t = p = float("nan")
        else:
            t, p = scipy.stats.ttest_1samp(differences, 0.0)
        found += [statistics.fmean(differences), float(t), float(p)]
    return Comparison(row.label, other.label, *found)


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """Format the mean ± sample standard deviation; one value has only a mean."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):  # a seed that diverged
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Label, accuracy in percent, loss and training loss of each row, as text."""
    return [
        (
            row.label,
            mean_and_std([100 * value for value in row.accuracy], 2),
            mean_and_std(row.loss, 4),
            mean_and_std(row.train_loss, 4),
        )
        for row in rows
    ]


def comparison_cells(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Both rows, then difference, t and p of accuracy and of loss, as text."""
    return [
        (
            c.row,
            c.against,
            f"{c.accuracy:+.2f} (t {c.accuracy_t:.1f}, {_p(c.accuracy_p)})",
            f"{c.loss:+.4f} (t {c.loss_t:.1f}, {_p(c.loss_p)})",
        )
        for c in comparisons
    ]


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"


TITLES = ("method", "accuracy (%)", "loss", "train loss")
COMPARISON_TITLES = ("average", "against", "accuracy (points)", "loss (nats)")


def make_tables(
    config: Config, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> list[rich.table.Table]:
    """The results as tables for the terminal."""
    scores = _table(
        f"{config.name}: test split, mean ± sample std of {config.seeds}"
        f" seed{'s' * (config.seeds > 1)}",
        TITLES,
        table_cells(rows),
    )
    if not comparisons:
        return [scores]
    title = "mean paired difference over seeds, two-sided t-test"
    return [scores, _table(title, COMPARISON_TITLES, comparison_cells(comparisons))]


def _table(
    title: str, titles: Sequence[str], cells: Sequence[Sequence[str]]
) -> rich.table.Table:
    table = rich.table.Table(title=title)
    for index, name in enumerate(titles):
        text = name in ("method", "average", "against")
        table.add_column(name, justify="left" if text else "right", no_wrap=index > 1)
    for row in cells:
        table.add_row(*row)
    return table


def make_markdown(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """The same tables in Markdown."""
    lines = ["| Method | Test accuracy (%) | Test loss | Train loss |"]
    lines += ["|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(cells)} |" for cells in table_cells(rows)]
    if comparisons:
        lines += ["", "| Average | Against | Accuracy (points) | Loss (nats) |"]
        lines += ["|---|---|---:|---:|"]
        lines += [f"| {' | '.join(c)} |" for c in comparison_cells(comparisons)]
    return "\n".join(lines) + "\n"


def config_dict(config: Config) -> dict[str, Any]:
    """The configuration in JSON's types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, pathlib.Path) else value

    return plain(dataclasses.asdict(config))


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the job in a work directory, wherever that is by now.

    Raises:
        ConfigError: There is none.
    """
    path = workdir / "config.json"
    try:
        content = json.loads(path.read_text())
        return from_json({**content, "workdir": str(workdir)})
    except (
        *(OSError, ValueError, TypeError, LookupError),
        *(AttributeError, AssertionError),
    ) as error:
        raise ConfigError(
            f"{path} does not hold the settings of a job ({error}); name the --workdir"
            " of one."
        ) from error


def write_results(
    config: Config, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> None:
    """Write results.md and, as the last file of a job, results.json."""
    markdown = make_markdown(rows, comparisons)
    write_atomic(config.workdir / "results.md", markdown.encode())
    content = {
        "config": config_dict(config),
        "rows": [dataclasses.asdict(row) for row in rows],
        "comparisons": [c._asdict() for c in comparisons],
    }
    write_json(config.workdir / "results.json", content)
