"""Record how this version of swa_jax writes every state: Flax's msgpack and Orbax.

    .venv/bin/python tests/golden/make_checkpoints.py

Writes ``checkpoints/VERSION``: ``states.msgpack`` and ``orbax``, the states of
``averages()`` after the first ``NUM_MODELS`` of ``models()``; and ``values.json``, the
averages that this version read from them, also after ``NUM_MODELS + 1``. Never record
a version anew that has been released: its files are what users have.
"""

import json
import pathlib
import shutil
from typing import Any

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint

import swa_jax

NUM_MODELS = 5
FOLDER = pathlib.Path(__file__).parent / "checkpoints"


def models() -> list[dict[str, Any]]:
    """The weights of each step, the last of which comes after the checkpoint."""
    rng = np.random.default_rng(0)
    return [
        {
            "dense": {
                "kernel": rng.normal(size=(3, 2)).astype(np.float32),
                "bias": rng.normal(size=3).astype(ml_dtypes.bfloat16),
            },
            "steps": np.int32(t),
        }
        for t in range(NUM_MODELS + 1)
    ]


def averages() -> dict[str, Any]:
    """Every average, and every form that its state has."""
    return {
        "swa": swa_jax.swa(),
        "swa_late": swa_jax.swa(start_step=2, period=2),
        "swa_bfloat16": swa_jax.swa(accumulator_dtype="bfloat16"),
        "compensated": swa_jax.swa(compensated=True),
        "ema": swa_jax.ema(0.7),
        "ema_warmup": swa_jax.ema(swa_jax.ema_warmup(0.9, power=0.75)),
        "power_ema": swa_jax.power_ema(gamma=2.5),
        "lawa": swa_jax.lawa(3),
        "swag": swa_jax.swag(3),
        "swag_diagonal": swa_jax.swag(0),
        "none_yet": swa_jax.ema(0.7, start_step=100),
    }


def recipe() -> tuple[swa_jax.SWA, swa_jax.TrainingState]:
    """The published method, and the state of its loop before the start."""
    method = swa_jax.SWA(0.4, 1, swa_lr=0.5)
    state = swa_jax.TrainingState(
        epoch=0,
        num_epochs=NUM_MODELS + 1,
        params=models()[0],
        batch_stats={},
        learning_rate=1.0,
    )
    return method, method.apply(swa_jax.Event.TRAINING_START, state)


def epoch_ended(method: swa_jax.SWA, state: Any, epoch: int) -> Any:
    """The same one epoch later, if it takes part."""
    state = state._replace(epoch=epoch, params=models()[epoch])
    matches = method.match(swa_jax.Event.EPOCH_END, state)
    return method.apply(swa_jax.Event.EPOCH_END, state) if matches else state


def fresh() -> dict[str, Any]:
    """States of no model yet, of other weights: what checkpoints are restored into."""
    other = jax.tree.map(lambda x: 0 * x - 7, models()[0])
    states = {
        name: swa_jax.init_average(other, average)
        for name, average in averages().items()
    }
    return {**states, "recipe": recipe()[1].swa}


def after(states: dict[str, Any], numbers: range) -> dict[str, Any]:
    """The states some models later."""
    states, made = dict(states), averages()
    for t in numbers:
        for name, average in made.items():
            states[name] = swa_jax.averaged_with(states[name], models()[t], average)
        method, state = recipe()
        states["recipe"] = epoch_ended(
            method, state._replace(swa=states["recipe"]), t
        ).swa
    return states


def read(states: dict[str, Any], like: dict[str, Any]) -> dict[str, list[float]]:
    """The averages as they are read; a number of float32 is one of Python's."""
    found = {}
    for name, state in states.items():
        params = swa_jax.averaged_params(state, like, allow_empty=True)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            numbers = np.asarray(leaf).astype(np.float64).tolist()
            found[f"{name}{jax.tree_util.keystr(path)}"] = numbers
    return found


def main() -> None:
    folder = FOLDER / swa_jax.__version__
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    then = after(fresh(), range(NUM_MODELS))
    later = after(then, range(NUM_MODELS, NUM_MODELS + 1))
    (folder / "states.msgpack").write_bytes(flax.serialization.to_bytes(then))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", then)
        checkpointer.wait_until_finished()
    (folder / "orbax" / "commit_success.txt").unlink(missing_ok=True)  # has this path
    values = {
        "then": read(then, models()[NUM_MODELS - 1]),
        "later": read(later, models()[NUM_MODELS]),
    }
    text = json.dumps(values, indent=1)
    (folder / "values.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
