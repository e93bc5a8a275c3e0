"""The tables of a job, for the terminal and in Markdown, from results.json."""

import json
from collections.abc import Sequence
from typing import NamedTuple, Self

import rich.table

from experiments.jobs.results import Comparison, Row
from experiments.runtime.tables import mean_and_std
from experiments.runtime.workdir import Workdir

TITLES = ("method", "accuracy (%)", "loss", "train loss", "ECE (%)")
COMPARISON_TITLES = ("average", "against", "accuracy (points)", "loss (nats)")


class Results(NamedTuple):
    """What results.json holds."""

    name: str  # of the experiment
    rows: list[Row]
    comparisons: list[Comparison]

    @property
    def has_budgets(self) -> bool:
        """Whether one run is read at several budgets; see `AnyBudget`."""
        return any(row.arm == "constant" for row in self.rows)

    @classmethod
    def read(cls, directory: Workdir) -> Self:
        """Read the file, which is there."""
        content = json.loads(directory.results.read_text())
        return cls(
            content["config"]["name"],
            [Row(**row) for row in content["rows"]],
            [Comparison(**c) for c in content["comparisons"]],
        )


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The columns of `TITLES` as text; the last one only where all rows have it."""
    cells: list[tuple[str, ...]] = [
        (
            row.label,
            mean_and_std([100 * value for value in row.accuracy], 2),
            mean_and_std(row.loss, 4),
            mean_and_std(row.train_loss, 4),
            mean_and_std([100 * value for value in row.ece], 2) if row.ece else "",
        )
        for row in rows
    ]
    return cells if all(row.ece for row in rows) else [c[:-1] for c in cells]


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


def make_tables(results: Results) -> list[rich.table.Table]:
    """The results as tables for the terminal."""
    seeds, cells = len(results.rows[0].accuracy), table_cells(results.rows)
    scores = _table(
        f"{results.name}: test split, mean ± sample std of {seeds}"
        f" seed{'s' * (seeds > 1)}",
        TITLES[: len(cells[0])],
        cells,
    )
    if not results.comparisons:
        return [scores]
    title = "mean paired difference over seeds, two-sided t-test"
    cells = comparison_cells(results.comparisons)
    return [scores, _table(title, COMPARISON_TITLES, cells)]


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


def make_markdown(results: Results) -> str:
    """The same tables in Markdown; of a job with many budgets, a column for each."""
    if results.has_budgets:
        return _budgets_markdown(results)
    scores = table_cells(results.rows)
    titles = ("Method", "Test accuracy (%)", "Test loss", "Train loss", "ECE (%)")
    lines = [f"| {' | '.join(titles[: len(scores[0])])} |"]
    lines += [f"|---|{'---:|' * (len(scores[0]) - 1)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in scores]
    if results.comparisons:
        cells = comparison_cells(results.comparisons)
        lines += ["", "| Average | Against | Accuracy (points) | Loss (nats) |"]
        lines += ["|---|---|---:|---:|"]
        lines += [f"| {' | '.join(c)} |" for c in cells]
    return "\n".join(lines) + "\n"


def _budgets_markdown(results: Results) -> str:
    """Scores by method and budget, and how far averages are from single runs."""
    epochs = sorted({row.epoch for row in results.rows})

    def method(label: str) -> str:
        return label.rpartition(", ")[0]

    def table(title: str, cells: dict[str, dict[int, str]]) -> list[str]:
        head = f"| {title}, by epochs | {' | '.join(map(str, epochs))} |"
        rows = [
            f"| {name} | {' | '.join(found[n] for n in epochs)} |"
            for name, found in cells.items()
        ]
        return [head, f"|---|{'---:|' * len(epochs)}", *rows, ""]

    accuracy: dict[str, dict[int, str]] = {}
    loss: dict[str, dict[int, str]] = {}
    for row, cells in zip(results.rows, table_cells(results.rows), strict=True):
        accuracy.setdefault(method(row.label), {})[row.epoch] = cells[1]
        loss.setdefault(method(row.label), {})[row.epoch] = cells[2]
    epoch_of = {row.label: row.epoch for row in results.rows}
    points: dict[str, dict[int, str]] = {}
    nats: dict[str, dict[int, str]] = {}
    for c in results.comparisons:
        name = f"{method(c.row)} - {method(c.against)}"
        n = epoch_of[c.row]
        points.setdefault(name, {})[n] = f"{c.accuracy:+.2f} ({_p(c.accuracy_p)})"
        nats.setdefault(name, {})[n] = f"{c.loss:+.3f} ({_p(c.loss_p)})"
    lines = table("Test accuracy (%)", accuracy) + table("Test loss", loss)
    if points:
        lines += table("Accuracy (points)", points) + table("Loss (nats)", nats)
    return "\n".join(lines[:-1]) + "\n"
