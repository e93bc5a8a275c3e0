"""Choosing the learning rates of all arms on the validation split.

Each trial is in tuning.json when it ends, so the same command goes on where it stopped.
The search is ours: the grid sampler of Optuna, say, takes a fixed grid, and ours grows
while its best value is at an edge.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from experiments.config.schema import Config, Tuning, override, settings_of
from experiments.data.splits import load_splits
from experiments.jobs.main import Trainer
from experiments.jobs.trials import Record, Setting, Trial
from experiments.runtime.tables import mean_and_std
from experiments.training.loop import Hooks, train
from experiments.training.plans import Arm, Readout, Weights
from experiments.training.scoring import Evaluation, Scorer
from experiments.training.step import TrainState

# A grid whose best value is at an edge grows, this often at most.
MAX_EXTENSIONS = 4
DIVERGED = Evaluation(0.0, math.inf, 1.0)  # never the best
TITLES = ("", "lr", "weight decay", "swa_lr", "control_lr", "accuracy (%)", "loss")

Merit = tuple[float, float]  # larger is better


def merit(scored_by: str, trials: Sequence[Trial]) -> Merit:
    """Sort key: mean accuracy, then minus the mean loss; for text minus the loss."""
    accuracy = statistics.fmean(statistics.fmean(t.accuracy) for t in trials)
    loss = statistics.fmean(statistics.fmean(t.loss) for t in trials)
    return (-loss, accuracy) if scored_by == "loss" else (accuracy, -loss)


def search_grid(
    start: Sequence[float],
    merit: Callable[[float], Any],
    factor: float,
    at_edge: Callable[[float], None] = lambda best: None,
) -> float:
    """Return the best of a grid, which grows while its best value is at an edge.

    A grid of one value stays: it is not searched.

    Args:
        start: First values, at least one.
        merit: Evaluates a value; called once for each. Larger is better.
        factor: Ratio of an added value to its neighbour.
        at_edge: Told of a best value that is at an edge still when growing ends.
    """
    merits = {value: merit(value) for value in sorted(start)}
    if len(merits) == 1:
        return start[0]
    for _ in range(MAX_EXTENSIONS):
        best = max(merits, key=merits.__getitem__)
        if best == max(merits):
            candidate = best * factor
        elif best == min(merits):
            candidate = best / factor
        else:
            break
        merits[candidate] = merit(candidate)
    best = max(merits, key=merits.__getitem__)
    if best in (max(merits), min(merits)):
        at_edge(best)
    return best


class _Validator(Hooks):
    """Scores an arm's readouts on the validation split.

    Raises FloatingPointError where there is nothing finite to score.
    """

    def __init__(self, arm: Arm, scorer: Scorer) -> None:
        self._arm, self._scorer = arm, scorer
        self.scores: dict[str, Evaluation] = {}

    def on_epoch_end(self, epoch: int, step: int, state: TrainState) -> None:
        known: dict[Weights, Evaluation] = {}
        for readout in _tuned(self._arm):
            weights = readout.weights
            if readout.epoch != epoch and not readout.stopped_early:
                continue
            if weights not in known:
                networks = self._scorer.networks(self._arm, state, weights)
                known[weights] = self._scorer.score(networks, "validation")
            score = known[weights]
            if not math.isfinite(score.loss):  # NaN would be the best or not by chance
                raise FloatingPointError(f"validation loss is {score.loss}")
            best = self.scores.get(readout.label, DIVERGED)
            if not readout.stopped_early or score.accuracy > best.accuracy:
                self.scores[readout.label] = score


def _tuned(arm: Arm) -> list[Readout]:
    return [readout for readout in arm.readouts if readout.weights in arm.tuned_by]


def _tuned_labels(arm: Arm) -> list[str]:
    return [readout.label for readout in _tuned(arm)]


def _setting(config: Config, arm: Arm) -> Setting:
    protocol: Any = config.protocol
    return (
        arm.name,
        config.optimizer.learning_rate,
        config.optimizer.weight_decay,
        protocol.swa_lr if arm.averages else None,
        protocol.control_lr if arm.name == "control" else None,
    )


class _Tuner:
    """Runs trials, shows each as it ends, and writes them down."""

    def __init__(
        self,
        trainer: Trainer,
        tuning: Tuning,
        console: rich.console.Console,
        record: Record,
    ) -> None:
        self._trainer, self._tuning = trainer, tuning
        self._console, self._record = console, record
        # Final states, by (arm, learning rate, weight decay, seed); on the host.
        self._parents: dict[tuple[str, float, float, int], TrainState] = {}
        self.trials: list[Trial] = []
        plan = trainer.config.plan
        self._plain, self._averaging = plan.plain.name, [a.name for a in plan.averaging]

    def run(self, names: Sequence[str], **overrides: float) -> Merit:
        """Train these arms with some settings changed; return their mean merit."""
        config = override(self._trainer.config, **overrides)
        trainer, plan = Trainer(config, self._trainer.splits), config.plan
        trials = []
        for name in names:
            arm = plan[name]
            found = self._run_arm(trainer, arm, plan.parent(arm))
            early = {r.label for r in arm.readouts if r.stopped_early}
            trials += [trial for trial in found if trial.label not in early]
        return merit(config.data.scored_by, trials)

    def _run_arm(self, trainer: Trainer, arm: Arm, parent: Arm | None) -> list[Trial]:
        earlier = self._find(_setting(trainer.config, arm), _tuned_labels(arm))
        trials = earlier or self._train(trainer, arm, parent)
        for trial in trials:
            note = "(known from tuning.json)" if earlier else ""
            cells = (*_cells(trial), note)
            self._console.print("  ".join(filter(None, cells)), soft_wrap=True)
        self.trials += [trial for trial in trials if trial not in self.trials]
        if not earlier:
            self._record.write(self.trials, None)
        return trials

    def _find(self, setting: Setting, labels: list[str]) -> list[Trial] | None:
        """A cell that another search tried, or an earlier process."""
        known = {t.label: t for t in self.trials if t.setting == setting}
        if known:
            return [known[label] for label in labels]
        return self._record.find(setting, labels)

    def _train(self, trainer: Trainer, arm: Arm, parent: Arm | None) -> list[Trial]:
        """Train an arm with every tuning seed, its parent first where that is new."""
        compiled, labels = trainer.compile(arm), _tuned_labels(arm)
        scores: dict[str, list[Evaluation]] = {label: [] for label in labels}
        for seed in range(self._tuning.tune_seeds):
            validator = _Validator(arm, trainer.scorer())
            try:
                start = self._parent_state(trainer, parent, seed) if parent else None
                train(compiled, seed, validator, start=start)
            except FloatingPointError:
                validator.scores = dict.fromkeys(labels, DIVERGED)
            for label in labels:
                scores[label].append(validator.scores[label])
        return [
            Trial(
                label,
                *_setting(trainer.config, arm),
                tuple(score.accuracy for score in scores[label]),
                tuple(score.loss for score in scores[label]),
            )
            for label in labels
        ]

    def _parent_state(self, trainer: Trainer, parent: Arm, seed: int) -> TrainState:
        optimizer = trainer.config.optimizer
        key = parent.name, optimizer.learning_rate, optimizer.weight_decay, seed
        if key not in self._parents:
            state = train(trainer.compile(parent), seed)
            self._parents[key] = jax.tree.map(np.array, jax.device_get(state))
        return self._parents[key]

    def _search(
        self, name: str, merit: Callable[[float], Any], factor: float, given: str = ""
    ) -> float:
        """Search the grid of a setting, and say so where it ends at an edge."""
        return search_grid(
            getattr(self._tuning, f"tune_{name}s"),
            merit,
            factor,
            lambda best: self._console.print(
                f"{name}: {best:g}, the best{given}, is still at the edge of its grid,"
                f" which grew {MAX_EXTENSIONS} times; give another first one with"
                f" --tune-{name.replace('_', '-')}s",
                soft_wrap=True,
            ),
        )

    def choose(self) -> dict[str, Any]:
        """Search every setting in turn; return the best ones."""
        best = self.plain()
        chosen: dict[str, Any] = {**best, "swa_lr": self.swa(best)}
        if hasattr(self._trainer.config.protocol, "control_lr"):
            chosen["control_lr"] = self.control(best)
        if hasattr(self._trainer.config.protocol, "peaks"):
            chosen["peaks"] = self.peaks(best)
        return chosen

    def plain(self) -> dict[str, float]:
        """Search weight decays and, for each, peak learning rates."""
        merits: dict[tuple[float, float], Merit] = {}

        def best_merit(weight_decay: float) -> Merit:
            def rate_merit(rate: float) -> Merit:
                found = self.run(
                    [self._plain], learning_rate=rate, weight_decay=weight_decay
                )
                merits[rate, weight_decay] = found
                return found

            given = f" with weight_decay {weight_decay:g}"
            self._search("learning_rate", rate_merit, 2, given)
            return max(m for (_, decay), m in merits.items() if decay == weight_decay)

        self._search("weight_decay", best_merit, 4)
        rate, decay = max(merits, key=merits.__getitem__)
        return {"learning_rate": rate, "weight_decay": decay}

    def swa(self, best: dict[str, float]) -> float:
        """Best constant rate, over all windows, with the plain arm's best settings."""
        return self._search(
            "swa_lr", lambda rate: self.run(self._averaging, **best, swa_lr=rate), 2
        )

    def peaks(self, best: dict[str, float]) -> tuple[float, ...]:
        """Best peak rate of each budget's plain arm, with the best weight decay."""

        def best_peak(name: str) -> float:
            return self._search(
                "learning_rate",
                lambda rate: self.run([name], **{**best, "learning_rate": rate}),
                2,
                f" of {name}",
            )

        plan = self._trainer.config.plan
        return tuple(best_peak(arm.name) for arm in plan if arm.name.startswith("sgd"))

    def control(self, best: dict[str, float]) -> float:
        """Best rate of training on without averaging."""
        return self._search(
            "control_lr",
            lambda rate: self.run(["control"], **best, control_lr=rate),
            math.sqrt(10),
        )


def _cells(trial: Trial) -> tuple[str, ...]:
    return (
        trial.label,
        f"{trial.learning_rate:g}",
        f"{trial.weight_decay:g}",
        "" if trial.swa_lr is None else f"{trial.swa_lr:g}",
        "" if trial.control_lr is None else f"{trial.control_lr:.3g}",
        mean_and_std([100 * value for value in trial.accuracy], 2),
        mean_and_std(trial.loss, 4),
    )


def tune(
    config: Config, tuning: Tuning, console: rich.console.Console
) -> dict[str, Any]:
    """Tune all arms on the validation split; write tuning.json, a trial at a time.

    First the plain arm's peak learning rate with each weight decay, at the whole
    budget, then SWA's constant rate, then the control's. Peak rate and weight decay are
    the plain arm's best ones in every arm: SWA and control get one setting of their
    own, plain training two. The test split is never read.

    Returns:
        The chosen learning_rate, weight_decay, swa_lr and, where the protocol has them,
        control_lr and peaks.

    Raises:
        DataUnavailableError: The data set cannot be had, or not as asked for.
        StorageError: Another job is at work in the work directory, it has a tuning with
            other settings, or it cannot be written.
    """
    directory = config.directory
    with directory.locked():
        record = Record(directory, {**settings_of(config), **_grids(tuning)})
        splits = load_splits(config.data, ("train", "validation"), hold_out=True)
        tuner = _Tuner(Trainer(config, splits), tuning, console, record)
        console.print(f"{config.name}: trials, scored on the validation split")
        console.print("  ".join(("arm", *TITLES[1:])))
        chosen = tuner.choose()
        record.write(tuner.trials, chosen)
    table = rich.table.Table(title=f"{config.name}: validation split")
    for title in TITLES:
        table.add_column(title, justify="right" if title else "left")
    for trial in tuner.trials:
        table.add_row(*_cells(trial))
    console.print(table)
    console.print(f"chosen: {chosen}; set them in experiments/config")
    return chosen


def _grids(tuning: Tuning) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(tuning).items()
    }
