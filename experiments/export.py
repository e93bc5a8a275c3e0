"""The averaged network of a finished run: `python -m experiments.export DIR`.

Writes the averaged parameters and the BatchNorm statistics recomputed for them, as an
Orbax checkpoint and as one safetensors file.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from experiments import data, plans, runs
from experiments.configs import from_json
from experiments.errors import StorageError
from experiments.results import config_dict
from experiments.settings import Config
from experiments.train import compile_arm

PyTree = Any


class ExportError(ValueError):
    """There is nothing to export; the message says why."""


def export(
    workdir: pathlib.Path,
    out: pathlib.Path | None = None,
    arm_name: str | None = None,
    seed: int = 0,
) -> tuple[pathlib.Path, dict[str, str]]:
    """Export the averaged network of a run.

    Args:
        workdir: Of the job.
        out: Directory to write. None: `workdir`/export.
        arm_name: An arm that averages. None: the one with the longest average.
        seed: Of the run.

    Returns:
        The directory, and what the safetensors file says of itself.

    Raises:
        ExportError: There is no such run, or it is not finished.
        StorageError: Its checkpoint is damaged.
    """
    config = _read_config(workdir)
    arms = {arm.name: arm for arm in plans.make_arms(config)}
    averaging = {
        name: arm for name, arm in arms.items() if arm.averages_from is not None
    }
    if arm_name is None:
        arm_name = min(averaging, key=lambda name: averaging[name].averages_from or 0)
    if arm_name not in averaging:
        raise ExportError(
            f"arm is {arm_name}; of this job, {', '.join(averaging)} average weights."
        )
    arm = averaging[arm_name]
    found = runs.finished_scores(config, arm, seed)
    if found is None:
        raise ExportError(
            f"{runs.run_directory(config, arm_name, seed)} is not a finished run; let"
            " the job end first, or name another --arm or --seed."
        )
    splits = data.load_splits(config, ("train", "test"))
    compiled = compile_arm(config, arm, splits["train"])
    scorer = runs.Scorer(config, splits)
    state = runs.final_state(config, compiled, seed)
    network = scorer.network(state, "average")
    score = scorer.test(network)
    metadata = {
        "experiment": config.name,
        "arm": arm_name,
        "seed": str(seed),
        "test_accuracy": str(score.accuracy),
        "test_loss": str(score.loss),
        "config": json.dumps(config_dict(config)),
    }
    out = workdir / "export" if out is None else out
    write_export(out, *network, metadata)
    return out, metadata


def _read_config(workdir: pathlib.Path) -> Config:
    path = workdir / "config.json"
    try:
        content = json.loads(path.read_text())
        return from_json({**content, "workdir": str(workdir)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"{path} does not hold the settings of a job ({error}); name the --workdir"
            " of one."
        ) from error


def write_export(
    out: pathlib.Path, params: PyTree, batch_stats: PyTree, metadata: dict[str, str]
) -> None:
    """Write a network's variables to `out`/orbax and `out`/model.safetensors.

    Args:
        out: Made anew; what it held before is replaced once the new is complete.
        params: Pytree of dicts, as Flax has it.
        batch_stats: Likewise; may be empty.
        metadata: Kept in the safetensors file.
    """
    variables = {"params": params}
    if batch_stats:
        variables["batch_stats"] = batch_stats
    variables = jax.tree.map(np.asarray, variables)
    draft = out.absolute().with_name(f".{out.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / "orbax", variables)
        flat = flax.traverse_util.flatten_dict(variables, sep="/")
        flat = {name: np.ascontiguousarray(array) for name, array in flat.items()}
        safetensors.numpy.save_file(flat, draft / "model.safetensors", metadata)
        if out.exists():
            shutil.rmtree(out)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
    except (ExportError, StorageError, data.DataUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
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
