"""What a job leaves to look at, beyond its tables: curves.png and width.png."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import data, plans, processes
from experiments.curves import plot_curves
from experiments.evaluate import averaged_variables, evaluate, fit_batch_stats
from experiments.files import write_atomic, write_json
from experiments.landscape import ScoreFn, measure, plot_width
from experiments.metrics import read_log
from experiments.networks import make_model
from experiments.plans import Arm
from experiments.runs import final_state, finished_scores, run_name
from experiments.settings import ONE_PROCESS, Config
from experiments.train import CompiledArm, TrainState, compile_arm

# Examples behind each point of width.png: hundreds of points are scored.
WIDTH_EXAMPLES = {"images": 2000, "text": 400}


def write_figures(
    config: Config, compiled: dict[str, CompiledArm], splits: dict[str, data.Split]
) -> None:
    """Draw the figures of a job whose runs are finished.

    Of the processes of a job the main one draws; the others have the same weights.

    Raises:
        StorageError: A run's final checkpoint cannot be read.
    """
    if processes.is_main():
        log = read_log(config.workdir / "metrics.jsonl")
        write_atomic(config.workdir / "curves.png", plot_curves(log))
    if config.width_plot:
        _write_width(config, compiled, splits)


def unfinished_runs(config: Config) -> list[str]:
    """The runs whose solutions width.png shows, but who are not there yet."""
    return [
        run_name(arm.name, 0)
        for arm in _width_arms(plans.make_arms(config))
        if finished_scores(config, arm, 0) is None
    ]


def measure_width(config: Config) -> None:
    """Write width.json and width.png from the checkpoints of finished runs.

    Nothing is written among the runs: a job may be at work on others.

    Raises:
        StorageError: A run's final checkpoint cannot be read.
        DataUnavailableError: The data set cannot be had.
    """
    # A state is the same under every strategy; here may be other devices.
    config = dataclasses.replace(config, parallel="none", cluster=ONE_PROCESS)
    splits = data.load_splits(config, ("train", "test"))
    arms = _width_arms(plans.make_arms(config))
    compiled = {arm.name: compile_arm(config, arm, splits["train"]) for arm in arms}
    _write_width(config, compiled, splits)


def _width_arms(arms: Sequence[Arm]) -> tuple[Arm, Arm]:
    """Plain training, and the longest average."""
    swa = min(
        (arm for arm in arms if arm.averages_from is not None),
        key=lambda arm: arm.averages_from or 0,
    )
    if swa.parent is not None:
        plain = next(arm for arm in arms if arm.name == swa.parent)
    else:  # the one trained as long as SWA
        plain = next(
            arm
            for arm in arms
            if arm.averages_from is None and arm.epochs == swa.epochs
        )
    return plain, swa


def _write_width(
    config: Config, compiled: dict[str, CompiledArm], splits: dict[str, data.Split]
) -> None:
    plain, swa = _width_arms([each.arm for each in compiled.values()])
    plain_state = final_state(config, compiled[plain.name], 0)
    swa_state = final_state(config, compiled[swa.name], 0)
    if not processes.is_main():
        return
    solutions = {
        plain.label: plain_state.params,
        "SWA": averaged_variables(swa_state)[0],
        "SWA's last iterate": swa_state.params,
    }
    found = measure(_score_fn(config, splits, plain_state), solutions)
    write_json(config.workdir / "width.json", found)
    title = f"Around the solutions on {config.name} (first seed)"
    write_atomic(config.workdir / "width.png", plot_width(found, title))


def _score_fn(
    config: Config, splits: dict[str, data.Split], state: TrainState
) -> ScoreFn:
    """Train loss and test error on some examples, BatchNorm fitted to each point."""
    model = make_model(config, splits["train"])
    size = config.eval_batch_size
    kind = "text" if config.dataset == "shakespeare" else "images"
    number = -(-WIDTH_EXAMPLES[kind] // size)

    def some(batches: Any) -> list[Any]:
        return list(itertools.islice(batches, number))

    train_batches = some(data.EvalBatches(splits["train"], size))
    test_batches = some(data.EvalBatches(splits["test"], size))
    inputs: list[np.ndarray] = some(data.InputBatches(splits["train"], size))

    def score(params: Any) -> tuple[float, float]:
        try:
            fitted = fit_batch_stats(model, params, state.batch_stats, inputs)
        except FloatingPointError:
            return math.nan, math.nan  # far out: a hole in the figure
        train = evaluate(model, params, fitted, train_batches)
        test = evaluate(model, params, fitted, test_batches)
        return train.loss, 100 * (1 - test.accuracy)

    return score
