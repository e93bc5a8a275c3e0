"""Which of the checkpoints on disk the command averages, the oldest first."""

import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from swa_jax.errors import CheckpointError

_NUMBER = re.compile(r"\d+")
_SUFFIXES = {".safetensors", ".msgpack"}


class Found(NamedTuple):
    """A checkpoint with a number in its name.

    Attributes:
      number: the last one in its name, as a rule the training step.
      path: where it is.
      source: the place of the input that it was found in.
    """

    number: int
    path: pathlib.Path
    source: int


def latest(inputs: Sequence[pathlib.Path], count: int) -> list[pathlib.Path]:
    """Those with the largest numbers in their names.

    Raises:
      ValueError: ``count`` is less than 1, or more than there are.
    """
    found = _counted(inputs, "--last", count)
    return [each.path for each in found[-count:]]


def best(
    inputs: Sequence[pathlib.Path], count: int, metric: str, smallest: bool
) -> list[pathlib.Path]:
    """Those with the largest, or smallest, value of a metric; of equals the latest.

    Raises:
      ValueError: ``count`` is less than 1, or more than there are.
      CheckpointError: a checkpoint without this metric, or with NaN.
    """
    found = _counted(inputs, "--best", count)
    sign = -1 if smallest else 1
    scores = {each: sign * _metric(each.path, metric) for each in found}
    chosen = sorted(found, key=lambda each: (scores[each], each.number))[-count:]
    return [each.path for each in sorted(chosen)]


def numbered(inputs: Sequence[pathlib.Path]) -> list[Found]:
    """All with a number in their names, by number.

    Args:
      inputs: checkpoints, or directories of them.

    Raises:
      FileNotFoundError: one of them is not there.
    """
    found = []
    for source, each in enumerate(inputs):
        if not each.exists():
            raise FileNotFoundError(f"{each}: there is no such file or directory")
        for path in _inside(each):
            name = path.stem if path.suffix in _SUFFIXES else path.name
            if numbers := _NUMBER.findall(name):
                found.append(Found(int(numbers[-1]), path, source))
    return sorted(found)


def _counted(inputs: Sequence[pathlib.Path], option: str, count: int) -> list[Found]:
    if count < 1:
        raise ValueError(f"{option} must be at least 1, got {count}")
    found = numbered(inputs)
    if len(found) < count:
        raise ValueError(
            f"{option} {count}: found {len(found)} checkpoints with a number in "
            f"their names, among {', '.join(map(str, inputs))}"
        )
    return found


def _inside(path: pathlib.Path) -> list[pathlib.Path]:
    """A checkpoint, or those in a directory that is none itself."""
    orbax = ("_METADATA", "_CHECKPOINT_METADATA")  # of a tree, and of a step of several
    whole = (*orbax, "model.safetensors*", "flax_model.msgpack")
    if not path.is_dir() or any(any(path.glob(name)) for name in whole):
        return [path]
    return [each for each in path.iterdir() if _may_be_one(each)]


def _may_be_one(path: pathlib.Path) -> bool:
    if path.name.startswith(".") or ".orbax-checkpoint-tmp" in path.name:
        return False
    named = path.suffix in _SUFFIXES or path.name.startswith("checkpoint_")
    return path.is_dir() or (path.suffix != ".json" and named)


def _metric(path: pathlib.Path, name: str) -> float:
    """A metric of a checkpoint, from the JSON object that belongs to it."""
    places = [path / "metrics" / "metrics", path / "metrics.json"]
    if path.is_file():
        places = [path.with_suffix(".json")]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise CheckpointError(
            f"{path}: has no metrics, which --best reads from a JSON object in "
            f"{' or '.join(str(place) for place in places)}"
        )
    try:
        metrics = json.loads(place.read_bytes())
        value = metrics[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
    except (ValueError, TypeError):
        raise CheckpointError(
            f"{place}: no JSON object in which {name!r} is a number"
        ) from None
    except KeyError:
        known = ", ".join(sorted(metrics)) or "none"
        raise CheckpointError(
            f"{place}: has no metric {name!r}; it has {known}"
        ) from None
    if math.isnan(value):
        raise CheckpointError(
            f"{place}: the metric {name!r} is NaN, neither better nor worse than any "
            "other; leave this checkpoint out"
        )
    return float(value)
