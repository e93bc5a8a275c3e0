"""The main job: train every arm with every seed, and score them on the test split."""

import json
import time
from typing import Any, TextIO

import rich.console

from experiments import data
from experiments.builders import Examples
from experiments.configs import Config
from experiments.evaluate import Evaluation, averaged_network, evaluate
from experiments.progress import Bar, progress_bar
from experiments.report import Curves, Row, make_table, open_log, write_report
from experiments.train import (
    Arm,
    EpochReport,
    Hooks,
    TrainState,
    make_arm,
    make_model,
    train,
)


class _Scorer:
    """Scores networks on the test split."""

    def __init__(self, config: Config, splits: dict[str, Examples]) -> None:
        size = config.eval_batch_size
        self._model = make_model(config)
        self._test_batches = data.eval_batches(splits["test"], size)
        self._image_batches = data.image_batches(splits["train"], size)

    def iterate(self, state: TrainState) -> Evaluation:
        """The network as SGD left it."""
        network = state.params, state.batch_stats
        return evaluate(self._model, *network, self._test_batches)

    def average(self, state: TrainState, recompute: bool = True) -> Evaluation:
        """The averaged weights, with or without the BatchNorm pass."""
        images = self._image_batches if recompute else None
        network = averaged_network(self._model, state, images)
        return evaluate(self._model, *network, self._test_batches)


class _RunHooks(Hooks):
    """Feeds the log and the bar; scores the first seed's network every epoch."""

    def __init__(
        self, config: Config, arm: Arm, seed: int, outputs: tuple[_Scorer, TextIO, Bar]
    ) -> None:
        self._config, self._arm, self._seed = config, arm, seed
        self._scorer, self._log, self._bar = outputs
        self.history: dict[str, list[float]] = {"iterate": [], "average": []}

    def _write(self, event: str, **values: Any) -> None:
        line = {"event": event, "arm": self._arm.name, "seed": self._seed, **values}
        print(json.dumps(line), file=self._log, flush=True)

    def on_step(self, step: int, loss: float, learning_rate: float) -> None:
        self._bar.step(step, loss, learning_rate)

    def on_report(self, report: EpochReport) -> None:
        self._write("train", **report._asdict())

    def on_epoch_end(self, epoch: int, state: TrainState) -> None:
        if self._seed > 0:
            return
        scores = {"iterate": self._scorer.iterate(state)}
        if epoch > self._config.epochs - self._arm.swa_epochs:
            scores["average"] = self._scorer.average(state)
        for weights, score in scores.items():
            self.history[weights].append(score.accuracy)
            self._write("test", epoch=epoch, weights=weights, **score._asdict())


def _run_arms(
    config: Config,
    arms: list[Arm],
    splits: dict[str, Examples],
    log: TextIO,
    bar: Bar,
) -> tuple[list[Row], list[dict[str, list[float]]]]:
    """Run all arms with all seeds; return the rows, and each arm's first history."""
    scorer = _Scorer(config, splits)
    rows, histories = [], []
    for arm in arms:
        averages = arm.swa_epochs > 0
        row = Row("swa" if averages else "sgd", arm.swa_epochs, averages)
        without_pass = Row("swa", arm.swa_epochs, bn_recomputed=False)
        for seed in range(config.seeds):
            hooks = _RunHooks(config, arm, seed, (scorer, log, bar))
            bar.start_run(f"{arm.name} seed {seed}", config.epochs, arm.steps_per_epoch)
            state = train(config, arm, seed, splits["train"], hooks)
            bar.finish_run()
            row.add(scorer.average(state) if averages else scorer.iterate(state))
            if averages:
                without_pass.add(scorer.average(state, recompute=False))
            if seed == 0:
                histories.append(hooks.history)
        rows.append(row)
    return [*rows, without_pass], histories  # of the last, longest window


def train_and_evaluate(config: Config, console: rich.console.Console) -> list[Row]:
    """Run the whole comparison; write its files into `config.workdir`.

    Args:
        config: The experiment. Each averaging window is a run of its own, with
            as many epochs as the baseline; the longest is also scored with the
            running BatchNorm statistics that training left, for comparison.
        console: Shows the progress bar and the table.

    Returns:
        The rows of results.json.
    """
    started = time.monotonic()
    splits = data.load_splits(config, ("train", "test"))
    sizes = ", ".join(f"{len(s.labels):,} {name}" for name, s in splits.items())
    console.print(f"{config.name}: {sizes} images")
    arms = [
        make_arm(config, splits["train"], window)
        for window in (0, *sorted(config.swa_epochs))
    ]
    total = len(arms) * config.seeds * config.epochs * arms[0].steps_per_epoch
    with (
        open_log(config) as log,
        progress_bar(console, total, config.batch_size) as bar,
    ):
        rows, histories = _run_arms(config, arms, splits, log, bar)
    curves = Curves(
        epochs=config.epochs,
        swa_epochs=arms[-1].swa_epochs,
        sgd_rates=arms[0].learning_rates,
        swa_rates=arms[-1].learning_rates,
        sgd=histories[0]["iterate"],
        swa_iterates=histories[-1]["iterate"],
        swa_average=histories[-1]["average"],
    )
    write_report(config, rows, curves)
    console.print(make_table(config, rows))
    console.print(
        f"{time.monotonic() - started:.0f} s; results.json, results.md,"
        f" metrics.jsonl and curves.png are in {config.workdir}"
    )
    return rows
