"""Checkpoints of runs, written by Orbax in the background.

A checkpoint takes its name only when it is complete, so that a process killed at any
moment leaves whole ones behind. Each array's CRC-32 is stored beside it and checked
when it is read. Orbax does not: of 60 bits flipped one at a time in the array files of
a checkpoint, 13 came back as other numbers without a word.

In a job of several processes every device holds the whole state, so the main process
alone touches the disk; the others are told what it found.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from experiments.runtime import processes
from experiments.runtime.errors import NO_ROOM_ERRNOS, StorageError

PyTree = Any
T = TypeVar("T")

# Room for what a checkpoint holds besides its arrays.
_METADATA_BYTES = 2**18


class Store:
    """The newest checkpoints of one run.

    All methods are called by every process of a job, and raise the same in all.
    """

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        """Open `directory`, which need not exist; keep the `keep` newest checkpoints.

        Raises:
            StorageError: The directory cannot be made or read.
        """
        self.directory = directory.absolute()
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._bytes = 0  # of the arrays of the checkpoint begun last
        self._on_main(self._open)

    def __enter__(self) -> Self:
        """Return itself; leaving closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close, without hiding the exception that comes through."""
        if exception[0] is None:
            self.close()
        else:
            with contextlib.suppress(StorageError):
                self.close()

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)  # of a save that was killed
        alone = jax.process_count() == 1
        options = ocp.options.MultiprocessingOptions()
        if not alone:  # the other processes do not take part
            options = ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="main"
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, multiprocessing_options=options, create=alone
            ),
        )

    def _on_main(self, work: Callable[[], T]) -> T | None:
        """Work in the main process; raise its failure, as ours, in all of them."""
        result: list[T] = []

        def attempt() -> None:
            try:
                result.append(work())
            except StorageError:
                raise
            except Exception as error:  # Orbax and tensorstore raise many kinds
                raise StorageError(self._explain(error)) from error

        processes.from_main(attempt)
        return result[0] if result else None

    def _explain(self, error: Exception) -> str:
        place = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        if not _has_room(place, self._bytes):
            return self._full()
        text = f"{type(error).__name__}: {error}".strip()
        return (
            f"{self.directory} cannot be used for checkpoints ({text[:500]});"
            f" {shutil.disk_usage(place).free:,} bytes are free there. Earlier"
            " checkpoints are intact."
        )

    def _full(self) -> str:
        free = shutil.disk_usage(self.directory).free
        return (
            f"{self.directory} cannot hold another checkpoint: the disk is full"
            f" ({free:,} bytes free). Earlier checkpoints are intact; free some"
            " space and run the same command again."
        )

    def latest(self) -> int | None:
        """Number of steps that the newest complete checkpoint has seen, if any."""
        found = self._on_main(lambda: self._opened.latest_step())
        return processes.from_main(lambda: found)

    @property
    def _opened(self) -> ocp.CheckpointManager:
        assert self._manager is not None  # only the main process comes here
        return self._manager

    def save(self, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        """Begin to write a checkpoint; earlier writing is waited for.

        Args:
            step: Its number. One that exists already stays as it is.
            state: Pytree of arrays on the host, which nobody changes any more.
            extra: What else to keep, in JSON's types. Copied.

        Raises:
            StorageError: This checkpoint, or the one before, cannot be written.
            TypeError: `extra` has something that JSON cannot hold.
        """
        # Orbax writes it in the background, while the caller's lists may grow.
        extra = json.loads(json.dumps(extra))

        def write() -> None:
            manager = self._opened
            manager.wait_until_finished()
            if step in manager.all_steps():
                return
            # A NumPy scalar would come back as a wider one.
            arrays = {n: np.asarray(leaf) for n, leaf in _flatten(state).items()}
            self._bytes = sum(a.nbytes for a in arrays.values())
            # A write that fails half-way is noisy: tensorstore's threads complain on
            # stderr. A quota, or another writer, can still bring that about.
            free = shutil.disk_usage(self.directory).free
            if free < self._bytes + _METADATA_BYTES:
                raise StorageError(self._full())
            sums = {name: _crc32(array) for name, array in arrays.items()}
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    record=ocp.args.JsonSave({"crc32": sums, "extra": extra}),
                ),
            )

        self._on_main(write)

    def wait(self) -> None:
        """Wait until the checkpoint begun last is complete.

        Raises:
            StorageError: It cannot be written.
        """

        def finish() -> None:
            self._opened.wait_until_finished()
            self._opened.check_for_errors()

        self._on_main(finish)

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]]:
        """Read the newest checkpoint.

        Args:
            like: Pytree whose leaves have the shapes and dtypes to expect.

        Returns:
            The step, the state (NumPy arrays in `like`'s structure) and the extra.

        Raises:
            StorageError: There is none, it is damaged, or it is of something else.
        """
        step = self.latest()
        if step is None:
            raise StorageError(f"{self.directory} holds no complete checkpoint.")
        found = self._on_main(lambda: self._read(step, like))
        extra = processes.from_main(lambda: found[1] if found else None)
        if found is not None:
            state = found[0]
        else:
            state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
        if jax.process_count() > 1:
            state = jax.tree.map(np.array, multihost_utils.broadcast_one_to_all(state))
        return step, state, extra

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        place = self.directory / str(step)
        others = [s for s in self._opened.all_steps() if s != step]
        before = f"from step {max(others)}" if others else "from the start"
        cure = f"Delete {place} to go on {before}; the other checkpoints are untouched."
        try:
            restored = self._opened.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(), record=ocp.args.JsonRestore()
                ),
            )
            arrays, record = restored["state"], restored["record"]
            sums, extra = record["crc32"], record["extra"]
        except Exception as error:
            raise StorageError(
                f"{place} is damaged ({type(error).__name__}: {str(error)[:300]})."
                f" {cure}"
            ) from error
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        expected = _flatten(like)
        wrong = sorted(arrays.keys() ^ expected.keys()) or [
            f"{name} is {arrays[name].dtype}{list(arrays[name].shape)} instead of"
            f" {leaf.dtype}{list(leaf.shape)}"
            for name, leaf in expected.items()
            if (arrays[name].shape, arrays[name].dtype) != (leaf.shape, leaf.dtype)
        ]
        if wrong:
            more = " and more" if len(wrong) > 3 else ""
            raise StorageError(
                f"{place} is a checkpoint of another network or optimizer: it differs"
                f" in {', '.join(wrong[:3])}{more}. Give another --workdir, or delete"
                " this one's runs."
            )
        for name, array in arrays.items():
            if _crc32(array) != sums.get(name):
                raise StorageError(
                    f"{place} is damaged: {name} does not have the check sum it was"
                    f" saved with. {cure}"
                )
        leaves = [arrays[name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), extra

    def close(self) -> None:
        """Wait for what is being written, and let go of the directory."""

        def shut() -> None:
            self._opened.wait_until_finished()
            self._opened.close()

        self._on_main(shut)


def _has_room(directory: pathlib.Path, size: int) -> bool:
    """Whether `size` bytes more can be written, by free space and by quota.

    Tensorstore's own errors say why a write failed in their text alone.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        return error.errno not in NO_ROOM_ERRNOS
    return True


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by the name of their path, in order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
