"""Choosing the learning rates of all arms on the validation split.

Each trial is in tuning.json when it ends, so the same command goes on where it stopped.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from experiments import data, plans
from experiments.checkpoints import open_workdir
from experiments.evaluate import Evaluation, averaged_network, evaluate
from experiments.networks import make_model
from experiments.plans import Arm
from experiments.results import mean_and_std
from experiments.settings import Config
from experiments.train import Hooks, TrainState, compile_arm, train
from experiments.trials import Record, Setting, Trial

# A grid whose best value is at an edge grows, this often at most.
MAX_EXTENSIONS = 4
DIVERGED = Evaluation(0.0, math.inf)  # never the best


Merit = tuple[float, float]  # larger is better


def merit(config: Config, trials: Sequence[Trial]) -> Merit:
    """Sort key: mean accuracy, then minus the mean loss; for text minus the loss."""
    accuracy = statistics.fmean(statistics.fmean(t.accuracy) for t in trials)
    loss = statistics.fmean(statistics.fmean(t.loss) for t in trials)
    return (-loss, accuracy) if config.dataset == "shakespeare" else (accuracy, -loss)


def search_grid(
    start: Sequence[float],
    merit: Callable[[float], Any],
    factor: float,
    at_edge: Callable[[float], None] = lambda best: None,
) -> float:
    """Return the best of a grid, which grows while its best value is at an edge.

    Args:
        start: First values, at least one.
        merit: Evaluates a value; called once for each. Larger is better.
        factor: Ratio of an added value to its neighbour.
        at_edge: Told of a best value that is at an edge still when growing ends.
    """
    merits = {value: merit(value) for value in sorted(start)}
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

    def __init__(self, config: Config, arm: Arm, splits: dict[str, data.Split]) -> None:
        self._arm = arm
        self._model = make_model(config, splits["train"])
        size = config.eval_batch_size
        self._batches = data.EvalBatches(splits["validation"], size)
        self._inputs = data.InputBatches(splits["train"], size)
        self.scores: dict[str, Evaluation] = {}

    def on_epoch_end(self, epoch: int, state: TrainState) -> None:
        for label, method, at, weights in self._arm.readouts:
            if at != epoch or weights != _tuned_weights(self._arm):
                continue
            network = (
                averaged_network(self._model, state, self._inputs)
                if method == "swa"
                else (state.params, state.batch_stats)
            )
            score = evaluate(self._model, *network, self._batches)
            if not math.isfinite(score.loss):  # NaN would be the best or not by chance
                raise FloatingPointError(f"validation loss is {score.loss}")
            self.scores[label] = score


def _tuned_weights(arm: Arm) -> plans.Weights:
    return "iterate" if arm.averages_from is None else "average"


def _tuned_labels(arm: Arm) -> list[str]:
    return [r.label for r in arm.readouts if r.weights == _tuned_weights(arm)]


def _setting(config: Config, arm: Arm) -> Setting:
    return (
        arm.name,
        config.learning_rate,
        config.weight_decay,
        config.swa_lr if arm.averages_from is not None else None,
        config.control_lr if arm.name == "control" else None,
    )


# Final states of arms, by (arm, learning rate, weight decay, seed); on the host.
_Parents = dict[tuple[str, float, float, int], TrainState]


def _run_trials(
    config: Config, splits: dict[str, data.Split], name: str, parents: _Parents
) -> list[Trial]:
    """Train an arm with every tuning seed, its parent first where that is new."""
    arms = {arm.name: arm for arm in plans.make_arms(config)}
    arm, train_split = arms[name], splits["train"]
    compiled = compile_arm(config, arm, train_split)
    labels = _tuned_labels(arm)
    scores: dict[str, list[Evaluation]] = {label: [] for label in labels}
    for seed in range(config.tune_seeds):
        validator = _Validator(config, arm, splits)
        try:
            start = _parent_state(config, arms, arm, seed, splits, parents)
            train(config, compiled, seed, train_split, validator, start=start)
        except FloatingPointError:
            validator.scores = dict.fromkeys(labels, DIVERGED)
        for label in labels:
            scores[label].append(validator.scores[label])
    return [
        Trial(
            label,
            *_setting(config, arm),
            tuple(score.accuracy for score in scores[label]),
            tuple(score.loss for score in scores[label]),
        )
        for label in labels
    ]


def _parent_state(
    config: Config,
    arms: dict[str, Arm],
    arm: Arm,
    seed: int,
    splits: dict[str, data.Split],
    parents: _Parents,
) -> TrainState | None:
    if arm.parent is None:
        return None
    key = arm.parent, config.learning_rate, config.weight_decay, seed
    if key not in parents:
        compiled = compile_arm(config, arms[arm.parent], splits["train"])
        state = train(config, compiled, seed, splits["train"])
        parents[key] = jax.tree.map(np.array, jax.device_get(state))
    return parents[key]


class _Tuner:
    """Runs trials, shows each as it ends, and writes them down."""

    def __init__(
        self,
        config: Config,
        splits: dict[str, data.Split],
        console: rich.console.Console,
        record: Record,
    ) -> None:
        self._config, self._splits, self._console = config, splits, console
        self._record = record
        self._parents: _Parents = {}
        self.trials: list[Trial] = []
        arms = plans.make_arms(config)
        self._plain = [
            arm.name for arm in arms if arm.averages_from is None and arm.parent is None
        ][-1]  # with the whole budget
        self._averaging = [arm.name for arm in arms if arm.averages_from is not None]

    def run(self, names: Sequence[str], **overrides: float) -> Merit:
        """Train these arms with some settings changed; return their mean merit."""
        config = dataclasses.replace(self._config, **overrides)  # type: ignore[arg-type]
        trials = []
        arms = {arm.name: arm for arm in plans.make_arms(config)}
        for name in names:
            trials += self._run_arm(config, arms[name])
        return merit(config, trials)

    def _run_arm(self, config: Config, arm: Arm) -> list[Trial]:
        earlier = self._record.find(_setting(config, arm), _tuned_labels(arm))
        trials = earlier or _run_trials(config, self._splits, arm.name, self._parents)
        for trial in trials:
            note = "(known from tuning.json)" if earlier else ""
            self._console.print("  ".join(filter(None, (*_cells(trial), note))))
        self.trials += trials
        if not earlier:
            self._record.write(self.trials, None)
        return trials

    def _search(
        self, name: str, merit: Callable[[float], Any], factor: float, given: str = ""
    ) -> float:
        """Search the grid of a setting, and say so where it ends at an edge."""
        return search_grid(
            getattr(self._config, f"tune_{name}s"),
            merit,
            factor,
            lambda best: self._console.print(
                f"{name}: {best:g}, the best{given}, is still at the edge of its grid,"
                f" which grew {MAX_EXTENSIONS} times; give another first one with"
                f" --tune-{name.replace('_', '-')}s"
            ),
        )

    def choose(self) -> dict[str, float]:
        """Search every setting in turn; return the best ones."""
        best = self.plain()
        chosen = {**best, "swa_lr": self.swa(best)}
        if self._config.protocol == "fine_tune":
            chosen["control_lr"] = self.control(best)
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


def tune(config: Config, console: rich.console.Console) -> dict[str, float]:
    """Tune all arms on the validation split; write tuning.json, a trial at a time.

    First the plain arm's peak learning rate with each weight decay, at the whole
    budget, then SWA's constant rate, then the control's. Peak rate and weight decay are
    the plain arm's best ones in every arm: SWA and control get one setting of their
    own, plain training two. The test split is never read.

    Returns:
        The chosen learning_rate, weight_decay, swa_lr and, when fine-tuning,
        control_lr.

    Raises:
        DataUnavailableError: The data set cannot be had, or not as asked for.
        StorageError: Another job is at work in the work directory, it has a tuning with
            other settings, or it cannot be written.
    """
    with open_workdir(config.workdir):
        record = Record(config)
        splits = data.load_splits(config, ("train", "validation"))
        tuner = _Tuner(config, splits, console, record)
        chosen = tuner.choose()
        record.write(tuner.trials, chosen)
    table = rich.table.Table(title=f"{config.name}: validation split")
    titles = "", "lr", "weight decay", "swa_lr", "control_lr", "accuracy (%)", "loss"
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for trial in tuner.trials:
        table.add_row(*_cells(trial))
    console.print(table)
    console.print(f"chosen: {chosen}; set them in experiments/configs.py")
    return chosen
