"""What a compiled step does with memory and devices, read from the executable.

The checks hold on every backend: CPU, and TPU or GPU compiled ahead of time. All
numbers are bytes per device. A "step" is anything that takes an average and returns
its successor.
"""

import collections
import dataclasses
import re
from typing import Any, NamedTuple

import jax
import numpy as np

#: An HLO instruction that copies: ``%name = f32[8,4]{1,0} copy(``. An asynchronous one
#: has a tuple type, of which the first array is the copy.
_COPY = re.compile(r" = \(?(\w+)\[([\d,]*)\]\S* copy(?:-start)?\(")
#: An HLO instruction that communicates; its type may be a tuple.
_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-broadcast"
    r"|collective-permute|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
#: An entry of the module's ``input_output_alias``, ``{4}: (4, {}, may-alias)``.
_ALIAS = re.compile(r"\{[\d, ]*\}: \(\d+, \{\}, (?:may|must)-alias\)")
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
        copied=sum(_bytes(*found) for found in _COPY.findall(compiled.as_text())),
    )


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits.group()) if digits else 8)
    return int(np.prod([int(d) for d in dims.split(",") if d], dtype=int)) * bits // 8


def programs(step: Any) -> int:
    """How many a jitted function has been compiled to; JAX has no public way to ask."""
    return step._cache_size()


def collectives(compiled: Any) -> collections.Counter[str]:
    """How often each kind of communication stands in a ``jax.stages.Compiled``."""
    found = _COLLECTIVE.findall(compiled.as_text())
    return collections.Counter(operation for _, operation in found)


def communicated(compiled: Any) -> int:
    """Bytes of the results of all communication; at least, where it is asynchronous."""
    return sum(
        _bytes(*array)
        for result, _ in _COLLECTIVE.findall(compiled.as_text())
        for array in _ARRAY.findall(result)
    )


def moved(compiled: Any, outputs: Any) -> list[str]:
    """The outputs that an executable leaves elsewhere than they should be.

    Args:
      compiled: a ``jax.stages.Compiled``.
      outputs: ``ShapeDtypeStruct``s, or arrays, with the shardings that are wanted;
        ``None`` for an array that may be anywhere.

    Returns:
      Their paths.
    """

    def differs(wanted: Any, sharding: Any) -> bool:
        if wanted is None:
            return False
        return not wanted.sharding.is_equivalent_to(sharding, len(wanted.shape))

    wrong = jax.tree.map(
        differs, outputs, compiled.output_shardings, is_leaf=lambda x: x is None
    )
    flat, _ = jax.tree_util.tree_flatten_with_path(wrong)
    return [jax.tree_util.keystr(path) for path, differ in flat if differ]


def bytes_per_device(tree: Any) -> int:
    """Size of a tree of arrays or ``ShapeDtypeStruct``s for one device."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        return int(np.prod(shape, dtype=int)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def in_host_memory(tree: Any) -> list[Any]:
    """The leaves that live in host memory."""
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if x.sharding.memory_kind == "pinned_host"]


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


@dataclasses.dataclass(frozen=True)
class Report:
    """An executable in numbers, which travel between processes as JSON.

    Attributes:
      average: bytes of the mean, or of one model where no mean is kept: the measure
        of what counts as large.
      donated: bytes of everything that the step was given to reuse.
      donated_leaves: the same, as a number of arrays.
      temporary: bytes of buffers that live only during the call, those in a TPU's
        on-chip memory included.
      peak: bytes beyond the arguments in device memory at the worst moment, as XLA
        estimates them: an output may count although it takes a donated input's place.
      aliased: bytes of outputs that take the place of a donated input. At least the
        array's own: a TPU pads to its tiles.
      aliased_leaves: the same, as a number of arrays.
      fresh: bytes of outputs that take no input's place.
      copied: bytes of the results of all copy instructions.
      collectives: how often each kind of communication occurs.
      communicated: bytes of their results.
      moved: paths of the outputs that are placed otherwise than their inputs.
      total: bytes that the call needs: arguments, outputs, temporaries, code.
      host_donated: of ``donated``, what lives in host memory.
      host_aliased: bytes of outputs in host memory in a donated input's place;
        ``aliased`` leaves them out.
      host_fresh: bytes of outputs in host memory that take no input's place.
      host_temporary: bytes in host memory that live only during the call.
    """

    average: int
    donated: int
    donated_leaves: int
    temporary: int
    peak: int
    aliased: int
    aliased_leaves: int
    fresh: int
    copied: int
    collectives: dict[str, int]
    communicated: int
    moved: list[str]
    total: int
    host_donated: int
    host_aliased: int
    host_fresh: int
    host_temporary: int

    @classmethod
    def of(cls, compiled: Any, *, average: Any, donated: Any, outputs: Any) -> "Report":
        """Reads a ``jax.stages.Compiled``; the trees are ``ShapeDtypeStruct``s.

        Args:
          compiled: the executable.
          average: the mean, or one model: the measure of what counts as large, which
            does not grow with what an average keeps besides.
          donated: everything that it may reuse.
          outputs: where its outputs should be, see ``moved``.
        """
        stats = compiled.memory_analysis()
        fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return cls(
            average=bytes_per_device(average),
            donated=bytes_per_device(donated),
            donated_leaves=len(jax.tree.leaves(donated)),
            temporary=stats.temp_size_in_bytes,
            peak=stats.peak_memory_in_bytes
            - stats.argument_size_in_bytes
            - stats.host_argument_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            aliased_leaves=len(_ALIAS.findall(compiled.as_text())),
            fresh=fresh,
            copied=memory(compiled).copied,
            collectives=dict(collectives(compiled)),
            communicated=communicated(compiled),
            moved=moved(compiled, outputs),
            total=stats.argument_size_in_bytes
            + fresh
            + stats.temp_size_in_bytes
            + stats.generated_code_size_in_bytes,
            host_donated=bytes_per_device(in_host_memory(donated)),
            host_aliased=stats.host_alias_size_in_bytes,
            host_fresh=stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes,
            host_temporary=stats.host_temp_size_in_bytes,
        )

    def violations(self, base: "Report") -> set[str]:
        """Which of the promises on an averaging step the executable breaks.

        Args:
          base: the same step without averaging.
        """
        allowed = NEGLIGIBLE * self.average
        beyond = collections.Counter(self.collectives)
        beyond.subtract(base.collectives)
        kept = {
            "temporaries": self.temporary <= allowed,
            "aliasing": self.aliased >= self.donated - self.host_donated
            and self.host_aliased >= self.host_donated
            and self.aliased_leaves >= self.donated_leaves,
            "copies": self.copied <= allowed,
            "collectives": all(count <= 0 for count in beyond.values()),
            "shardings": not self.moved,
        }
        return {promise for promise, holds in kept.items() if not holds}
