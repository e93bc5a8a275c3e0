"""What a job leaves to look at, beyond its tables: curves.png and width.png."""

import functools
import itertools
from typing import Any

import numpy as np

import swa_jax
from experiments import data, processes
from experiments.curves import plot_curves
from experiments.evaluate import evaluate, make_batch_stats_fn
from experiments.files import write_atomic, write_json
from experiments.landscape import measure, plot_width
from experiments.metrics import read_log
from experiments.networks import make_model
from experiments.runs import final_state
from experiments.settings import Config
from experiments.train import CompiledArm, TrainState

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
    solutions = _solutions(config, compiled) if config.width_plot else {}
    if not processes.is_main():
        return
    log = read_log(config.workdir / "metrics.jsonl")
    write_atomic(config.workdir / "curves.png", plot_curves(log))
    if solutions:
        states = {label: state for label, (state, _) in solutions.items()}
        params = {label: each for label, (_, each) in solutions.items()}
        some = next(iter(states.values()))
        found = measure(_score_fn(config, splits, some.batch_stats), params)
        write_json(config.workdir / "width.json", found)
        title = f"Around the solutions on {config.name} (first seed)"
        write_atomic(config.workdir / "width.png", plot_width(found, title))


def _solutions(
    config: Config, compiled: dict[str, CompiledArm]
) -> dict[str, tuple[TrainState, Any]]:
    """State and parameters: plain training's, SWA's, and SWA's last iterate."""
    swa = min(
        (each for each in compiled.values() if each.arm.averages_from is not None),
        key=lambda each: each.arm.averages_from or 0,
    )
    plain = compiled[swa.arm.parent] if swa.arm.parent else None
    if plain is None:  # the one trained as long as SWA
        plain = next(
            each
            for each in compiled.values()
            if each.arm.averages_from is None and each.arm.epochs == swa.arm.epochs
        )
    plain_state = final_state(config, plain, 0)
    swa_state = final_state(config, swa, 0)
    averaged = swa_jax.swa_params(swa_state.opt_state, swa_state.params)
    return {
        plain.arm.label: (plain_state, plain_state.params),
        "SWA": (swa_state, averaged),
        "SWA's last iterate": (swa_state, swa_state.params),
    }


def _score_fn(config: Config, splits: dict[str, data.Split], batch_stats: Any) -> Any:
    """Train loss and test error on some examples, BatchNorm fitted to each point."""
    model = make_model(config, splits["train"])
    size = config.eval_batch_size
    kind = "text" if config.dataset == "shakespeare" else "images"
    number = -(-WIDTH_EXAMPLES[kind] // size)

    def some(batches: Any) -> list[Any]:
        return list(itertools.islice(batches, number))

    train_batches = some(data.eval_batches(splits["train"], size))
    test_batches = some(data.eval_batches(splits["test"], size))
    inputs: list[np.ndarray] = some(data.input_batches(splits["train"], size))
    recompute = functools.partial(
        swa_jax.recompute_batch_stats, make_batch_stats_fn(model)
    )

    def score(params: Any) -> tuple[float, float]:
        fitted = recompute(params, batch_stats, inputs) if batch_stats else batch_stats
        train = evaluate(model, params, fitted, train_batches)
        test = evaluate(model, params, fitted, test_batches)
        return train.loss, 100 * (1 - test.accuracy)

    return score
