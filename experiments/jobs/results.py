"""What a job found: the scores of every seed, and paired tests."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from experiments.jobs.run import Score
from experiments.training.plans import ABLATIONS, Plan, Weights


@dataclasses.dataclass
class Row:
    """One line of the results: which weights, scored with every seed.

    The fields are those of a row in results.json.
    """

    label: str
    method: str  # as in `Readout`
    arm: str
    epoch: int  # at whose end the weights were scored
    weights: Weights
    accuracy: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)
    ece: list[float] = dataclasses.field(default_factory=list)  # empty: not measured

    def add(self, score: Score) -> None:
        """Append the next seed's scores."""
        self.accuracy.append(score.accuracy)
        self.loss.append(score.loss)
        self.train_loss.append(score.train_loss)
        if score.ece is not None:
            self.ece.append(score.ece)


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


def make_rows(plan: Plan) -> dict[tuple[str, str], Row]:
    """Empty rows in the order of the table, by (arm, label).

    Arms that average come last.
    """
    return {
        (arm.name, r.label): Row(r.label, r.method, arm.name, r.epoch, r.weights)
        for arm in sorted(plan, key=lambda arm: arm.averages)
        for r in arm.readouts
    }


def compare(rows: Sequence[Row], plan: Plan) -> list[Comparison]:
    """Test each average against plain training as long, and against its parent."""
    return [
        _test(row, other)
        for row, other in itertools.product(rows, rows)
        if row.method != "sgd" and row.weights not in ABLATIONS
        if other.method == "sgd"
        if other.epoch == row.epoch or other.arm == plan[row.arm].parent
        if len(row.accuracy) > 1
    ]


def _test(row: Row, other: Row) -> Comparison:
    import scipy.stats  # a second of import time, needed once a job

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
