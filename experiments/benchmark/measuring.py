"""Two things in turns, and the ratio of their times."""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

PyTree = Any
Action = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to measure, and what."""

    rounds: int = 15
    """Times that each pair is measured, at least 2."""

    batch_size: int = 32
    """Images in a step of ResNet-50."""

    image_size: int = 64
    """Their height and width."""

    only: tuple[Literal["a", "b", "c", "d", "e", "f", "g", "h", "p"], ...] = ()
    """Sections to run, by letter. Empty: all but h (14 GB of disk) and p."""

    checkpoint_bytes: int = 2_000_000_000
    """Size of each of the four checkpoints of section h."""

    scratch: pathlib.Path | None = None
    """Where section h puts them. None: the system's directory for temporary files."""

    output: pathlib.Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One measured ratio."""

    section: str
    what: str
    ratio: float
    low: float  # first quartile
    high: float  # third quartile
    target: str
    note: str = ""


# A finished OpenMP loop of the C code or of PyTorch would otherwise keep its threads
# spinning into the next turn, at the expense of whoever comes next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def take_turns(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """Time every action once a round, in an order that changes; seconds by name."""
    for action in actions.values():  # compile, warm the caches
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        for name in in_turn(actions, number):
            start = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The names in the order of a round: another one comes first each time."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(
    section: str,
    what: str,
    pair: tuple[Sequence[float], Sequence[float]],
    target: str,
    note: str = "",
) -> Line:
    """The ratio of two lists of seconds, round by round."""
    ratios = [a / b for a, b in zip(*pair, strict=True)]
    low, middle, high = quartiles(ratios)
    return Line(section, what, middle, low, high, target, note)


def in_milliseconds(
    section: str, what: str, seconds: Sequence[float], target: str
) -> Line:
    """A time that is compared with nothing."""
    low, middle, high = (1e3 * x for x in quartiles(seconds))
    return Line(section, f"{what}, in ms", middle, low, high, target)


def jax_threads() -> int:
    """Threads that JAX computes with on a CPU: one a core."""
    return len(os.sched_getaffinity(0))
