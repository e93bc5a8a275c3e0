"""When averaging starts, samples and ends, as people write it: fractions, time strings.

A schedule of averaging is worked out in *ticks*, the moments at which a model may be
averaged: the ends of epochs, or, if the interval is given in batches, the ends of
batches. Tick 1 is the first of them; there is no tick 0, because initial weights are
never averaged.
"""

import fractions
import math
import re
from typing import Any, Literal, NamedTuple

from swa_jax._sampling import Sampling
from swa_jax._validate import MAX_COUNT, check_count, shown

_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(dur|ep|ba)")


class Time(NamedTuple):
    """A point in training, or a stretch of it.

    Attributes:
      value: how many units, exact.
      unit: ``"dur"`` for the whole of training, ``"ep"`` epochs, ``"ba"`` batches.
    """

    value: fractions.Fraction
    unit: Literal["dur", "ep", "ba"]


def parse_time(name: str, text: Any) -> Time:
    """Reads ``"0.7dur"``, ``"6ep"`` or ``"500ba"``.

    Raises:
      TypeError: ``text`` is no string.
      ValueError: it is none of these forms, a fraction of an epoch or batch, or more
        than the whole of training.
    """
    forms = 'a time string such as "0.7dur", "6ep" or "500ba"'
    if not isinstance(text, str):
        raise TypeError(f"{name} must be {forms}, got {shown(text)}")
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{name} must be {forms}, got {text!r}")
    number, unit = match.groups()
    value = fractions.Fraction(number)
    if unit != "dur" and value.denominator != 1:
        raise ValueError(
            f"{name} must be a whole number of epochs or batches, got {text!r}; "
            'give fractions of the whole of training, as in "0.75dur"'
        )
    if unit == "dur" and value > 1:
        raise ValueError(
            f'{name} must be at most "1dur", the whole of training, got {text!r}'
        )
    return Time(value, unit)  # type: ignore[arg-type]


class Length(NamedTuple):
    """How long training is.

    Attributes:
      num_epochs: epochs, >= 1.
      steps_per_epoch: batches in each, >= 1; ``None`` while nobody has said.
    """

    num_epochs: int
    steps_per_epoch: int | None

    @classmethod
    def of(cls, num_epochs: Any, steps_per_epoch: Any) -> "Length":
        """Checks both numbers."""
        return cls(
            check_count("num_epochs", num_epochs),
            None
            if steps_per_epoch is None
            else check_count("steps_per_epoch", steps_per_epoch),
        )

    def updates(self) -> int:
        """Optimizer updates in all, or the error that they cannot be counted."""
        updates = self.num_epochs * self.steps("optimizer updates")
        if updates > MAX_COUNT:
            raise ValueError(
                f"num_epochs * steps_per_epoch must be at most {MAX_COUNT}, got "
                f"{self.num_epochs} * {self.steps_per_epoch} = {updates}: optimizers "
                "count updates in int32"
            )
        return updates

    def steps(self, needed_for: str) -> int:
        """Batches in an epoch, or the error that names what needs them."""
        if self.steps_per_epoch is None:
            raise ValueError(
                f"steps_per_epoch is needed for {needed_for}, got None; set "
                "TrainingState.steps_per_epoch to the number of batches in an epoch"
            )
        return self.steps_per_epoch


class Window(NamedTuple):
    """Which models are averaged.

    Attributes:
      unit: what a tick is: the end of an epoch, ``"ep"``, or of a batch, ``"ba"``.
      when: the ticks whose models are averaged; ``when.start`` is at least 1, and
        ``when.stop`` is there.
      total: last tick of training.
    """

    unit: Literal["ep", "ba"]
    when: Sampling
    total: int

    def describe(self, tick: int) -> str:
        """``tick`` as a caller counts."""
        return f"epoch {tick - 1}" if self.unit == "ep" else f"batch {tick}"

    def ends_early(self, tick: int) -> bool:
        """Whether training continues from the average at ``tick``."""
        return bool(tick == self.when.stop < self.total)


def window(
    start: float | str, end: str | None, interval: str, length: Length
) -> Window:
    """Works out the ticks.

    A number as ``start`` follows the first published rule: with
    ``s = int(start * num_epochs)``, the first model is that of the end of epoch ``s``
    counted from 0, so after ``s + 1`` epochs. A time string is the elapsed time from
    which on models are averaged: ``"8ep"`` is after 8 epochs.

    Raises:
      ValueError: nothing would be averaged, or ``length`` lacks what is needed.
    """
    period = parse_time("update_interval", interval)
    by_epoch = period.unit == "ep"
    if by_epoch:
        total = length.num_epochs
    else:
        total = length.num_epochs * length.steps(f"update_interval={interval!r}")

    def tick(name: str, text: str) -> int:
        """The first tick at which so much time has passed."""
        value, unit = parse_time(name, text)
        if unit == "dur":
            return math.ceil(value * total)
        if unit == period.unit:
            return int(value)
        steps = length.steps(f"{name}={text!r} with update_interval={interval!r}")
        return math.ceil(value / steps) if by_epoch else int(value) * steps

    if isinstance(start, str):
        first = tick("swa_start", start)
    else:
        epoch = int(start * length.num_epochs) + 1
        first = epoch if by_epoch else epoch * (total // length.num_epochs)
    last = total if end is None else tick("swa_end", end)
    ticks = "epochs" if by_epoch else "batches"
    if total > MAX_COUNT:
        raise ValueError(
            f"training has {total} {ticks}, but they are counted in int32, up to "
            f"{MAX_COUNT}; give num_epochs and steps_per_epoch of a shorter run"
        )
    for name, text, at in (("swa_start", start, first), ("swa_end", end, last)):
        if at > total:
            raise ValueError(
                f"{name}={text!r} is after {at} {ticks}, but training has {total}: "
                "the averaging window is empty; start and end before training does"
            )
    if last < first:
        raise ValueError(
            f"swa_end={end!r} (after {last} {ticks}) is before swa_start={start!r} "
            f"(after {first}): the averaging window is empty; end later"
        )
    # A longer period samples no more than one of the whole length, and counts in int32.
    every = min(int(period.value), total)
    return Window("ep" if by_epoch else "ba", Sampling(first, every, last), total)
