"""The averaged network of a finished run, in files of its own.

The averaged parameters and the BatchNorm statistics recomputed for them, as an Orbax
checkpoint and as one safetensors file.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from experiments.config.named import read_config
from experiments.config.schema import settings_of
from experiments.data.splits import load_splits
from experiments.jobs.main import Trainer
from experiments.jobs.run import final_state, finished
from experiments.runtime.errors import StorageError
from experiments.training.plans import Arm, Plan

PyTree = Any

FILES = {"orbax", "model.safetensors"}  # what an export consists of


def export(
    workdir: pathlib.Path,
    out: pathlib.Path | None = None,
    arm: str | None = None,
    seed: int = 0,
) -> tuple[pathlib.Path, dict[str, str]]:
    """Export the averaged network of a run.

    Args:
        workdir: Of the job.
        out: Directory to make, `workdir`/export by default. An earlier export there is
            replaced once the new one is complete, and so is an empty directory; nothing
            else is.
        arm: An arm that averages. None: the one with the longest average.
        seed: Of the run.

    Returns:
        The directory, and what the safetensors file says of itself.

    Raises:
        StorageError: `workdir` is not a job's, there is no such run, it is not
            finished, one of its files is damaged, or `out` cannot be made.
        DataUnavailableError: The data set, needed for BatchNorm, cannot be had.
    """
    config = read_config(workdir)
    directory, chosen = config.directory, _averaging_arm(config.plan, arm)
    if finished(directory, chosen, seed) is None:
        raise StorageError(
            f"{directory.run(chosen.name, seed).directory} is not a finished run; let"
            " the job end first, or name another --arm or --seed."
        )
    out = directory.export if out is None else out
    with directory.drawing(), _becoming(out) as draft:
        # A state is the same under every strategy; here may be other devices.
        trainer = Trainer(config.alone(), load_splits(config.data, ("train", "test")))
        state = final_state(directory, trainer.compile(chosen), seed)
        scorer = trainer.scorer()
        network = scorer.network(state, "average")
        score = scorer.score(network, "test")
        metadata = {
            "experiment": config.name,
            "arm": chosen.name,
            "seed": str(seed),
            "test_accuracy": str(score.accuracy),
            "test_loss": str(score.loss),
            "config": json.dumps(settings_of(config)),
        }
        _write(draft, *network, metadata)
    return out, metadata


def _averaging_arm(plan: Plan, name: str | None) -> Arm:
    if name is None:
        return plan.longest
    for arm in plan.averaging:
        if arm.name == name:
            return arm
    names = ", ".join(arm.name for arm in plan.averaging)
    raise StorageError(f"arm is {name}; of this job, {names} average weights.")


@contextlib.contextmanager
def _becoming(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new directory, which takes the place of `out` if the body succeeds."""
    place = out.resolve()
    _check_replaceable(place)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield draft
        _check_replaceable(place)  # a while has passed
        try:
            _swap(draft, place)
        except OSError as error:
            raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: pathlib.Path, place: pathlib.Path) -> None:
    """Rename `draft` to `place`; what was there goes last, or stays if that fails."""
    old = draft.with_name(f"{draft.name}.old")
    if place.exists():
        os.replace(place, old)
    try:
        os.replace(draft, place)
    except OSError:
        if old.exists():
            os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _unwritable(out: pathlib.Path, error: Exception) -> StorageError:
    return StorageError(f"out is {out}, which cannot be written ({error}).")


def _check_replaceable(out: pathlib.Path) -> None:
    """Let nothing be lost but an earlier export."""
    try:
        held = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise StorageError(
            f"out is {out}, which is or lies under a file; name a directory to make."
        ) from error
    except OSError as error:
        raise _unwritable(out, error) from error
    if held and not (held == FILES and _is_export(out / "model.safetensors")):
        raise StorageError(
            f"out is {out}, which holds something other than an earlier export"
            f" ({', '.join(sorted(held)[:3])}{', …' * (len(held) > 3)}); name a"
            " directory that is empty or not there."
        )


def _is_export(path: pathlib.Path) -> bool:
    """Whether `_write` wrote this safetensors file."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return "experiment" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def _write(
    out: pathlib.Path, params: PyTree, batch_stats: PyTree, metadata: dict[str, str]
) -> None:
    """Write a network to `out`/orbax and, with `metadata`, `out`/model.safetensors."""
    variables = {"params": params}
    if batch_stats:
        variables["batch_stats"] = batch_stats
    variables = jax.tree.map(np.asarray, variables)
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat = {name: np.ascontiguousarray(array) for name, array in flat.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(out / "orbax", variables)
        safetensors.numpy.save_file(flat, out / "model.safetensors", metadata)
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise _unwritable(out, error) from error
