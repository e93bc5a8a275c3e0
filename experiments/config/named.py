"""The named experiments, and those that work directories hold."""

import pathlib

# In the order of the list that `--help` shows.
from experiments.config import cpu, gpu
from experiments.config.registry import EXPERIMENTS, Experiment
from experiments.config.schema import Config, from_settings
from experiments.runtime.errors import StorageError
from experiments.runtime.workdir import Workdir

__all__ = ["DIGITS", "EXPERIMENTS", "Experiment", "cpu", "gpu", "read_config"]

DIGITS = EXPERIMENTS["digits"].config


def read_config(workdir: pathlib.Path) -> Config:
    """The configuration of the job in a work directory, wherever that is by now.

    Raises:
        StorageError: There is none.
    """
    directory = Workdir(workdir)
    try:
        content = directory.read_settings()
        default = EXPERIMENTS[content["name"]].config
        return from_settings(default, {**content, "workdir": str(workdir)})
    except (StorageError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{directory.config} does not hold the settings of a job ({error}); name"
            " the --workdir of one."
        ) from error
