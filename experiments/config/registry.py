"""What a named experiment is, and all of them.

Each says how to run it, what to expect and from where that is known, and how long it
takes.
"""

import dataclasses
import pathlib
from typing import NamedTuple

from experiments.config.schema import (
    Config,
    Tuning,
)


class Experiment(NamedTuple):
    """A named experiment."""

    text: str  # all that is said of it
    config: Config
    tuning: Tuning

    @property
    def summary(self) -> str:
        """One line for `--help`."""
        return self.text.splitlines()[0]


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(name: str, config: Config, tuning: Tuning, text: str) -> None:
    """Add an experiment; its first line is the line in `--help`."""
    places = {"name": name, "workdir": pathlib.Path("runs") / name}
    named = dataclasses.replace(config, **places)  # type: ignore[arg-type]
    EXPERIMENTS[name] = Experiment(text.strip(), named, tuning)
