"""Stored power averages of a run, and the widths between them that were never kept."""

import io
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import swa_jax
from experiments.runtime import processes
from experiments.runtime.files import write_atomic
from experiments.training.averages import Average
from experiments.training.plans import Arm
from experiments.training.step import TrainState

PyTree = Any
# Enough for what lies between: sixteen of each width give it to half a per cent.
_MOMENTS = 16


class Snapshots:
    """The power averages of a run at some ends of epochs, each in a file.

    They outlive the process, as the run's checkpoints do.
    """

    def __init__(self, directory: pathlib.Path, arm: Arm) -> None:
        """Of an arm's run; nothing is kept where no width is asked for afterwards."""
        self._directory, self._arm = directory, arm
        wanted = any(each.make is None for each in arm.others)
        self._kept = [each for each in arm.others if each.make and each.width]
        self._kept = self._kept if wanted else []

    def keep(self, epoch: int, step: int, state: TrainState) -> None:
        """Store what a state has, if the epoch is one of those."""
        arm = self._arm
        done, last = epoch - arm.first_epoch, arm.epochs - arm.first_epoch
        if done % max(1, round(last / _MOMENTS)) and done != last:
            return
        for average in self._kept:
            params = swa_jax.averaged_params(
                state.opt_state, state.params, average.name
            )
            content = io.BytesIO()
            np.savez(content, *map(np.asarray, jax.tree.leaves(params)))
            path = self._directory / f"{average.width:g}-{step}.npz"
            write_atomic(path, content.getvalue())

    def read(self, average: Average, step: int, like: PyTree) -> PyTree:
        """An average after `step` steps that was not kept, from those that were.

        Args:
            average: Its width lies between those of the stored ones.
            step: The run's own, at the end of an epoch.
            like: Weights, for their structure.
        """
        assert average.width is not None
        found = jax.tree.map(np.asarray, like)
        if processes.is_main():  # on whose disk they are
            stored = self._stored(jax.tree.structure(like))
            found = swa_jax.posthoc_ema(stored, sigma_rel=average.width, step=step)
        if jax.process_count() > 1:
            found = multihost_utils.broadcast_one_to_all(found)
        return found

    def _stored(self, treedef: Any) -> Iterator[swa_jax.Snapshot]:
        def load(path: pathlib.Path) -> Callable[[], PyTree]:
            def loaded() -> PyTree:
                with np.load(path) as file:
                    return jax.tree.unflatten(treedef, list(file.values()))

            return loaded

        for path in sorted(self._directory.glob("*.npz")):
            width, step = path.stem.split("-")
            yield swa_jax.Snapshot(int(step), float(width), load(path))
