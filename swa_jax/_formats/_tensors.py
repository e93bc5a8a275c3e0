"""What a checkpoint is to whoever averages it: named tensors, read in pieces."""

import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import numpy as np


class Spec(NamedTuple):
    """A tensor without its numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        """As messages show it, ``float32 (3, 4)``."""
        return f"{self.dtype.name} {self.shape}"


class Checkpoint(Protocol):
    """A checkpoint, open for reading.

    Attributes:
      path: as the caller gave it, for messages.
      tensors: what it holds, by name, in the order of the file.
      in_pieces: whether parts of a tensor can be read alone; else ``read`` reads all.
    """

    path: pathlib.Path
    tensors: dict[str, Spec]
    in_pieces: bool

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` of a tensor in C order, of shape (n,)."""

    def writer(self, output: pathlib.Path, specs: dict[str, Spec]) -> "Writer":
        """What writes a checkpoint of the same kind."""

    def close(self) -> None:
        """Gives the files back."""


class Writer(Protocol):
    """A checkpoint that appears whole, or not at all."""

    def __enter__(self) -> Self:
        """Makes room: an error if there is none."""

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        """The numbers of a tensor; tensors come in the order of the specs."""

    def finish(self) -> None:
        """Puts it in its place."""

    def __exit__(self, *error: object) -> None:
        """Leaves nothing behind, unless it is finished."""
