"""Which arms an experiment has: how long, from where, at which rates, averaged when."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training.averages import Average

# Which weights of a state: "iterate", "average" (SWA's), one of `ABLATIONS`, or another
# average of the arm by its name.
Weights = str
ALONG = "average, statistics averaged along"
WITHOUT_PASS = "average, no BatchNorm pass"
ABLATIONS = ALONG, WITHOUT_PASS


class Readout(NamedTuple):
    """A line of the results: which weights are scored when."""

    label: str
    method: str  # "sgd", whatever the optimizer, "swa", or the kind of another average
    epoch: int  # at whose end
    weights: Weights
    # Of the epoch until then whose weights were best on the validation split.
    stopped_early: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training, run with every seed."""

    name: str  # of its directory and in logs
    label: str  # in words
    epochs: int  # number of its last epoch
    # From steps per epoch to a schedule; step 0 is the arm's own first step.
    schedule: Callable[[int], optax.Schedule]
    readouts: tuple[Readout, ...]
    averages_from: int | None = None  # first epoch whose end is averaged
    others: tuple[Average, ...] = ()  # averages beside SWA's
    tuned_by: tuple[Weights, ...] = ("iterate",)  # whose scores choose its rate
    parent: str | None = None  # arm whose final weights it starts from
    first_epoch: int = 0  # epochs that the parent trained

    @property
    def averages(self) -> bool:
        """Whether it averages at all."""
        return self.averages_from is not None

    def averages_at(self, epoch: int) -> bool:
        """Whether an average exists at the end of `epoch`."""
        return self.averages_from is not None and epoch >= self.averages_from

    def learning_rates(self, steps_per_epoch: int) -> np.ndarray:
        """The rate of each of the arm's own steps, [steps] float32."""
        steps = (self.epochs - self.first_epoch) * steps_per_epoch
        rates = jax.jit(jax.vmap(self.schedule(steps_per_epoch)))(jnp.arange(steps))
        # A constant schedule gives one number for all steps.
        return np.broadcast_to(np.asarray(rates, np.float32), (steps,))


def longest_average(arms: Iterable[Any]) -> Any:
    """Of things with `averages_from`, the one that averages longest; None without."""
    averaging = (arm for arm in arms if arm.averages_from is not None)
    return min(averaging, key=lambda arm: arm.averages_from, default=None)


class Plan:
    """The arms of an experiment, by name; parents come before their children."""

    def __init__(self, arms: Iterable[Arm]) -> None:
        """Of these arms, one of which averages."""
        self._arms = {arm.name: arm for arm in arms}

    def __iter__(self) -> Iterator[Arm]:
        """The arms, in order."""
        return iter(self._arms.values())

    def __getitem__(self, name: str) -> Arm:
        """The arm of this name."""
        return self._arms[name]

    def parent(self, arm: Arm) -> Arm | None:
        """The arm whose final weights it starts from."""
        return None if arm.parent is None else self[arm.parent]

    @property
    def roots(self) -> dict[str, str]:
        """For each arm, the one that it starts from in the end: itself if from none."""
        found: dict[str, str] = {}
        for arm in self:
            found[arm.name] = found[arm.parent] if arm.parent else arm.name
        return found

    @property
    def averaging(self) -> list[Arm]:
        """The arms that average."""
        return [arm for arm in self if arm.averages]

    @property
    def longest(self) -> Arm:
        """The arm that averages longest."""
        return longest_average(self)

    @property
    def plain(self) -> Arm:
        """Plain training with the whole budget, from scratch; what tuning tunes."""
        plain = [arm for arm in self if not arm.averages and arm.parent is None]
        return plain[-1]

    @property
    def baseline(self) -> Arm:
        """What the longest average starts from, or stands beside."""
        return self.parent(self.longest) or next(
            arm
            for arm in self
            if not arm.averages and arm.epochs == self.longest.epochs
        )
