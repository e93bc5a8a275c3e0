"""What a compiled step does with memory, read from the executable.

The checks hold on every backend: CPU, and TPU or GPU compiled ahead of time. All
numbers are bytes per device. A "step" is anything that takes an average and returns
its successor.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

#: An HLO instruction that copies: ``%name = f32[8,4]{1,0} copy(``. An asynchronous one
#: has a tuple type, of which the first array is the copy.
_COPY = re.compile(r" = \(?(\w+)\[([\d,]*)\]\S* copy(?:-start)?\(")
_BITS = {"pred": 8, "c64": 64, "c128": 128}

#: Of the average: counters, scalars and layout scraps stay below it in any model worth
#: measuring, a single misplaced temporary of the average is at 100 %.
NEGLIGIBLE = 0.05


class Memory(NamedTuple):
    """Bytes per device that one call of an executable moves or allocates."""

    temporary: int  # buffers that live only during the call
    aliased: int  # outputs that take the place of a donated input
    copied: int  # results of all copy instructions, loop bodies counted once


def memory(compiled: Any) -> Memory:
    """Reads a ``jax.stages.Compiled``."""
    stats = compiled.memory_analysis()
    return Memory(
        temporary=stats.temp_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        copied=sum(_copied(match) for match in _COPY.finditer(compiled.as_text())),
    )


def _copied(match: re.Match[str]) -> int:
    dtype, dims = match.groups()
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits.group()) if digits else 8)
    return int(np.prod([int(d) for d in dims.split(",") if d], dtype=int)) * bits // 8


def bytes_per_device(tree: Any) -> int:
    """Size of a tree of arrays or ``ShapeDtypeStruct``s on one device."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        return int(np.prod(shape, dtype=int)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def assert_in_place(compiled: Any, *, donated: Any, average: Any) -> None:
    """Asserts that a step keeps no second average, and writes none but in place.

    Args:
      compiled: the step, a ``jax.stages.Compiled``.
      donated: everything that it was given to reuse; all of it must be reused.
      average: the mean, the measure of what counts as large.
    """
    found, allowed = memory(compiled), NEGLIGIBLE * bytes_per_device(average)
    assert found.aliased >= bytes_per_device(donated), f"not all in place: {found}"
    assert found.temporary <= allowed, f"large temporaries: {found}"
    assert found.copied <= allowed, f"large copies: {found}"
