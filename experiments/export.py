"""The averaged network of a finished run: `python -m experiments.export DIR`.

Writes the averaged parameters and the BatchNorm statistics recomputed for them, as an
Orbax checkpoint and as one safetensors file.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from experiments import data, plans, runs
from experiments.errors import explanation
from experiments.evaluate import Evaluation
from experiments.plans import Arm
from experiments.results import ConfigError, config_dict, read_config
from experiments.settings import ONE_PROCESS, Config
from experiments.train import compile_arm

PyTree = Any

FILES = {"orbax", "model.safetensors"}  # what an export consists of


class ExportError(ValueError):
    """There is nothing to export, or nowhere; the message says why."""


def export(
    workdir: pathlib.Path,
    out: pathlib.Path | None = None,
    arm_name: str | None = None,
    seed: int = 0,
) -> tuple[pathlib.Path, dict[str, str]]:
    """Export the averaged network of a run.

    Args:
        workdir: Of the job.
        out: Directory to make, `workdir`/export by default. An earlier export there is
            replaced once the new one is complete, and so is an empty directory; nothing
            else is.
        arm_name: An arm that averages. None: the one with the longest average.
        seed: Of the run.

    Returns:
        The directory, and what the safetensors file says of itself.

    Raises:
        ConfigError: `workdir` is not a job's.
        ExportError: There is no such run, it is not finished, or `out` cannot be made.
        StorageError: One of the run's files is damaged.
        DataUnavailableError: The data set, needed for BatchNorm, cannot be had.
    """
    config = read_config(workdir)
    arm = _averaging_arm(config, arm_name)
    if runs.finished_scores(config, arm, seed) is None:
        raise ExportError(
            f"{runs.run_directory(config, arm.name, seed)} is not a finished run; let"
            " the job end first, or name another --arm or --seed."
        )
    out = workdir / "export" if out is None else out
    with _becoming(out) as draft:
        network, score = _averaged(config, arm, seed)
        metadata = {
            "experiment": config.name,
            "arm": arm.name,
            "seed": str(seed),
            "test_accuracy": str(score.accuracy),
            "test_loss": str(score.loss),
            "config": json.dumps(config_dict(config)),
        }
        _write(draft, *network, metadata)
    return out, metadata


def _averaging_arm(config: Config, name: str | None) -> Arm:
    arms = [arm for arm in plans.make_arms(config) if arm.averages_from is not None]
    if name is None:
        return min(arms, key=lambda arm: arm.averages_from or 0)
    for arm in arms:
        if arm.name == name:
            return arm
    names = ", ".join(arm.name for arm in arms)
    raise ExportError(f"arm is {name}; of this job, {names} average weights.")


def _averaged(
    config: Config, arm: Arm, seed: int
) -> tuple[tuple[PyTree, PyTree], Evaluation]:
    """The averaged network of a finished run, and its scores on the test split."""
    # A state is the same under every strategy; here may be other devices.
    config = dataclasses.replace(config, parallel="none", cluster=ONE_PROCESS)
    splits = data.load_splits(config, ("train", "test"))
    compiled = compile_arm(config, arm, splits["train"])
    scorer = runs.Scorer(config, splits)
    network = scorer.network(runs.final_state(config, compiled, seed), "average")
    return network, scorer.test(network)


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


def _unwritable(out: pathlib.Path, error: Exception) -> ExportError:
    return ExportError(f"out is {out}, which cannot be written ({error}).")


def _check_replaceable(out: pathlib.Path) -> None:
    """Let nothing be lost but an earlier export."""
    try:
        held = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise ExportError(
            f"out is {out}, which is or lies under a file; name a directory to make."
        ) from error
    except OSError as error:
        raise _unwritable(out, error) from error
    if held and not (held == FILES and _is_export(out / "model.safetensors")):
        raise ExportError(
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


def main(args: Sequence[str] | None = None) -> int:
    """Export from the work directory that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export",
        description="Write the averaged network of a finished run to files.",
    )
    parser.add_argument("workdir", type=pathlib.Path, help="of the job")
    parser.add_argument("--out", type=pathlib.Path, help="default: WORKDIR/export")
    parser.add_argument("--arm", help="default: the one with the longest average")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    try:
        out, metadata = export(given.workdir, given.out, given.arm, given.seed)
    except Exception as error:
        known = isinstance(error, ExportError | ConfigError)
        text = str(error) if known else explanation(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1
    percent = 100 * float(metadata["test_accuracy"])
    loss = float(metadata["test_loss"])
    print(
        f"{out}/orbax and {out}/model.safetensors: {metadata['arm']} seed"
        f" {metadata['seed']}, test accuracy {percent:.2f} %, test loss {loss:.4f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
