"""Choosing the learning rates of both arms on the validation split."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
import rich.table

from experiments import data
from experiments.builders import Examples
from experiments.configs import Config
from experiments.evaluate import Evaluation, averaged_network, evaluate
from experiments.report import config_dict, mean_and_std, write_json
from experiments.train import make_arm, make_model, train

# A grid whose best value is at an edge grows, this often at most.
MAX_EXTENSIONS = 4


@dataclasses.dataclass(frozen=True)
class Trial:
    """One cell of a tuning grid: settings, scored with several seeds."""

    swa_epochs: int  # 0: the SGD arm
    learning_rate: float
    weight_decay: float
    swa_lr: float | None  # None for the SGD arm
    accuracy: tuple[float, ...]  # on the validation split, one per seed; fractions
    loss: tuple[float, ...]

    @property
    def merit(self) -> tuple[float, float]:
        """Sort key: mean accuracy, then minus the mean loss."""
        return statistics.fmean(self.accuracy), -statistics.fmean(self.loss)


def search_grid(
    start: Sequence[float], merit: Callable[[float], Any], factor: float
) -> float:
    """Return the best of a grid, which grows while its best value is at an edge.

    Args:
        start: First values, at least one.
        merit: Evaluates a value; called once for each. Larger is better.
        factor: Ratio of an added value to its neighbour.
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
    return max(merits, key=merits.__getitem__)


def _run_trial(
    config: Config, splits: dict[str, Examples], swa_epochs: int
) -> tuple[Evaluation, ...]:
    model = make_model(config)
    arm = make_arm(config, splits["train"], swa_epochs)
    batches = data.eval_batches(splits["validation"], config.eval_batch_size)
    images = data.image_batches(splits["train"], config.eval_batch_size)
    scores = []
    for seed in range(config.tune_seeds):
        try:
            state = train(config, arm, seed, splits["train"])
        except FloatingPointError:
            scores.append(Evaluation(0.0, math.inf))  # diverged: never the best
            continue
        network = (
            averaged_network(model, state, images)
            if swa_epochs
            else (state.params, state.batch_stats)
        )
        scores.append(evaluate(model, *network, batches))
    return tuple(scores)


class _Tuner:
    """Runs trials, shows each as it ends, and remembers them."""

    def __init__(
        self,
        config: Config,
        splits: dict[str, Examples],
        console: rich.console.Console,
    ) -> None:
        self._config, self._splits, self._console = config, splits, console
        self.trials: list[Trial] = []

    def run(self, swa_epochs: int, **overrides: float) -> Trial:
        config = dataclasses.replace(self._config, **overrides)  # type: ignore[arg-type]
        scores = _run_trial(config, self._splits, swa_epochs)
        trial = Trial(
            swa_epochs,
            config.learning_rate,
            config.weight_decay,
            config.swa_lr if swa_epochs else None,
            tuple(score.accuracy for score in scores),
            tuple(score.loss for score in scores),
        )
        self._console.print(" ".join(_cells(trial)))
        self.trials.append(trial)
        return trial

    def sgd(self) -> Trial:
        """Search weight decays and, for each, peak learning rates."""

        def best_merit(weight_decay: float) -> tuple[float, float]:
            def merit(rate: float) -> tuple[float, float]:
                trial = self.run(0, learning_rate=rate, weight_decay=weight_decay)
                return trial.merit

            search_grid(self._config.tune_learning_rates, merit, factor=2)
            return max(
                trial.merit
                for trial in self.trials
                if trial.weight_decay == weight_decay
            )

        search_grid(self._config.tune_weight_decays, best_merit, factor=4)
        return max(self.trials, key=lambda trial: trial.merit)

    def swa(self, best: Trial) -> float:
        """Best constant rate, over all windows, with the SGD arm's best settings."""

        def merit(swa_lr: float) -> float:
            trials = [
                self.run(
                    window,
                    learning_rate=best.learning_rate,
                    weight_decay=best.weight_decay,
                    swa_lr=swa_lr,
                )
                for window in self._config.swa_epochs
            ]
            return statistics.fmean(trial.merit[0] for trial in trials)

        return search_grid(self._config.tune_swa_lrs, merit, factor=2)


def _cells(trial: Trial) -> tuple[str, ...]:
    return (
        f"swa{trial.swa_epochs}" if trial.swa_epochs else "sgd",
        f"{trial.learning_rate:g}",
        f"{trial.weight_decay:g}",
        "" if trial.swa_lr is None else f"{trial.swa_lr:g}",
        mean_and_std([100 * value for value in trial.accuracy], 2),
        mean_and_std(trial.loss, 4),
    )


def tune(config: Config, console: rich.console.Console) -> dict[str, float]:
    """Tune both arms on the validation split; write tuning.json.

    First SGD's peak learning rate with each weight decay, then SWA's constant rate.
    Peak rate and weight decay are the baseline's best ones in both arms: SWA gets
    one setting of its own, the baseline two. The test split is never read.

    Returns:
        The chosen learning_rate, weight_decay and swa_lr.
    """
    splits = data.load_splits(config, ("train", "validation"))
    tuner = _Tuner(config, splits, console)
    best = tuner.sgd()
    chosen = {
        "learning_rate": best.learning_rate,
        "weight_decay": best.weight_decay,
        "swa_lr": tuner.swa(best),
    }
    table = rich.table.Table(title=f"{config.name}: validation split")
    for title in ("arm", "lr", "weight decay", "swa_lr", "accuracy (%)", "loss"):
        table.add_column(title, justify="right")
    for trial in tuner.trials:
        table.add_row(*_cells(trial))
    console.print(table)
    console.print(f"chosen: {chosen}; set them in experiments/configs.py")
    write_json(
        config.workdir / "tuning.json",
        {
            "config": config_dict(config),
            "chosen": chosen,
            "trials": [dataclasses.asdict(trial) for trial in tuner.trials],
        },
    )
    return chosen
