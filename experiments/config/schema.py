"""The configuration of an experiment: a part for each room, which alone sees it.

On the command line and in config.json settings stand flat, by names that are unique
over all parts.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import tyro

from experiments import models
from experiments.data.dataset import DataSet
from experiments.models import Model
from experiments.runtime.checks import (
    ALL_POSITIVE,
    AT_LEAST_1,
    check,
    check_settings,
)
from experiments.runtime.processes import ONE_PROCESS, Cluster
from experiments.runtime.workdir import Workdir
from experiments.training.optimizer import Optimizer
from experiments.training.plans import Plan
from experiments.training.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class Saving:
    """How often things are written."""

    checkpoint_every: int = 500
    """Steps between two checkpoints of a run; each end of a run has one too."""

    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep of the run in progress."""

    log_every: int = 50
    """Steps between two losses in metrics.jsonl and TensorBoard."""

    width_plot: bool = True
    """Draw width.png at the end: the loss around the solutions of the first seed."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run, naming the setting and the rule."""
        check_settings(
            self, AT_LEAST_1, "checkpoint_every", "keep_checkpoints", "log_every"
        )


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a job trains on."""

    parallel: Literal["none", "pmap", "shard_map", "jit"] = "none"
    """Train on one device, or on all of the job's by this strategy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """The first grid of each rate, which grows while its best value is at an edge.

    One value is kept, as a setting that is not searched.
    """

    tune_seeds: int = 1
    """Number of seeds behind each cell of the tuning tables."""

    tune_learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Peak rates."""

    tune_weight_decays: tuple[float, ...] = (5e-4, 2e-3)
    """Weight decays, each with its own search for a rate."""

    tune_swa_lrs: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Values of `swa_lr`, shared by the SWA arms."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        check_settings(self, AT_LEAST_1, "tune_seeds")
        grids = [f.name for f in dataclasses.fields(self) if f.name != "tune_seeds"]
        check_settings(self, ALL_POSITIVE, *grids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuneTuning(Tuning):
    """With a grid for the control's rate as well."""

    tune_control_lrs: tuple[float, ...] = (0.001, 0.01)
    """Values of `control_lr`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment."""

    name: Annotated[str, tyro.conf.Suppress] = ""
    """Of the experiment on the command line."""

    workdir: pathlib.Path = pathlib.Path()
    """Directory for results, logs, curves and checkpoints."""

    seeds: int
    """Number of seeds; arms with the same seed share weights and data order."""

    data: DataSet
    """What is trained on."""

    model: Model
    """The network."""

    optimizer: Optimizer
    """What all arms share."""

    protocol: Protocol
    """Which arms there are, and how long they train."""

    saving: Saving = Saving()
    """How often things are written."""

    devices: Devices = Devices()
    """Where it runs."""

    cluster: Cluster = ONE_PROCESS
    """The processes of a job on many hosts."""

    share: tuple[int, int] = (1, 1)
    """Do a part of the runs alone, such as the second of six: --share 2 6. All parts
    may be at work at once in one work directory; the same command without it then
    writes the results."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        check_settings(self, AT_LEAST_1, "seeds")
        part, parts = self.share
        check(
            1 <= part <= parts,
            f"share is {part} {parts}; the first number says which part, from 1 to the"
            " second, as in --share 2 6.",
        )

    @property
    def network(self) -> Model:
        """The network, made for the data set; neither is loaded."""
        return models.build(self.model, self.data.inputs)

    @property
    def plan(self) -> Plan:
        """The arms."""
        batch_norm = models.has_batch_norm(self.network)
        return self.protocol.plan(self.optimizer, batch_norm)

    @property
    def directory(self) -> Workdir:
        """The work directory."""
        return Workdir(self.workdir, self.share)

    def alone(self) -> Self:
        """The same on one device of one process: a state is the same everywhere."""
        return dataclasses.replace(self, devices=Devices(), cluster=ONE_PROCESS)


# What is not a setting: of a part, and of a network.
_HIDDEN = {"name", "parent", "axis_name"}


def _names(part: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(part)}


# Settings that may change while a job goes on: they say where things are, how they are
# watched, and which processes are at work, not what is computed. `parallel` is not
# among them: strategies differ in what dropout draws, and in rounding. Of finished
# runs, as many seeds are shown as are asked for.
FREE = _names(Saving) | _names(Cluster) | {"workdir", "data_dir", "seeds", "share"}
# Those in which the processes of a job may differ: each has its own disk.
_OWN = _names(Cluster) | {"workdir", "data_dir"}


def _leaves(part: Any, inside: str = "") -> Iterator[tuple[str, Any, str]]:
    """Name and value of each setting, and the part that it belongs to."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name == "data" and not isinstance(value, DataSet):
            continue  # what a network is made for
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, field.name)
        elif field.name not in _HIDDEN:
            yield field.name, value, inside


def settings_of(config: Any) -> dict[str, Any]:
    """All settings by name, in JSON's types; "name" is the experiment's."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        return str(value) if isinstance(value, pathlib.Path) else value

    found = {name: plain(value) for name, value, _ in _leaves(config)}
    return {"name": config.name, **found}


def shared_settings(config: Any) -> dict[str, Any]:
    """Those that all processes of a job must have alike."""
    found = settings_of(config)
    return {name: value for name, value in found.items() if name not in _OWN}


def override(config: Config, **settings: Any) -> Config:
    """The same with some settings changed, whatever parts they are in.

    Raises:
        TypeError: There is no such setting.
        ValueError: A value cannot be.
    """
    places = {name: inside for name, _, inside in _leaves(config)}
    unknown = sorted(settings.keys() - places.keys())
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no setting of {config.name}")
    parts: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        parts.setdefault(places[name], {})[name] = value
    changed = parts.pop("", {})
    for inside, values in parts.items():
        changed[inside] = dataclasses.replace(getattr(config, inside), **values)
    return dataclasses.replace(config, **changed)


def from_settings(default: Config, content: Mapping[str, Any]) -> Config:
    """The configuration that config.json holds.

    Args:
        default: The experiment of that name. What an earlier version of this program
            knew of it, and this one does not, is passed by.
        content: As `settings_of` has it.
    """
    names = {name for name, _, _ in _leaves(default)}
    known: dict[str, Any] = {n: v for n, v in content.items() if n in names}
    for name, value in known.items():
        if isinstance(value, list):
            known[name] = tuple(value)
        elif name in ("workdir", "data_dir") and value is not None:
            known[name] = pathlib.Path(value)
    return override(default, **known)
