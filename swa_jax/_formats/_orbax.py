"""Orbax checkpoints: a step's directory, or the root of a ``CheckpointManager``.

Orbax reads tensors one at a time, whole. It writes trees, whose averaged leaves wait in
a file without a name until all are there.
"""

import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from swa_jax._formats._place import check_absent, hidden_folder
from swa_jax._formats._tensors import Spec
from swa_jax.errors import CheckpointError

_TREE = "_METADATA"


def find_step(path: pathlib.Path) -> pathlib.Path | None:
    """The directory of a tree: ``path`` itself, an item in it, or the latest step's."""
    if (path / _TREE).is_file():
        return path
    items = sorted(item.parent for item in path.glob(f"*/{_TREE}"))
    if len(items) == 1 and not items[0].name.isdigit():
        return items[0]
    if len(items) > 1 and not all(item.name.isdigit() for item in items):
        raise CheckpointError(
            f"{path}: holds several items, {', '.join(item.name for item in items)}; "
            "name the directory of the one with the weights"
        )
    steps = [step for step in path.iterdir() if step.is_dir() and step.name.isdigit()]
    return find_step(max(steps, key=lambda step: int(step.name))) if steps else None


class OrbaxStep:
    """One tree of arrays."""

    in_pieces = False

    def __init__(self, path: pathlib.Path, step: pathlib.Path) -> None:
        """Reads what it holds, no numbers yet."""
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                f"{path}: reading Orbax checkpoints needs orbax-checkpoint; install "
                "swa_jax[checkpoints]"
            ) from error
        self.path, self._step, self._orbax = path, step.absolute(), ocp
        self._checkpointer = ocp.PyTreeCheckpointer()
        try:
            self._tree = self._checkpointer.metadata(self._step).item_metadata.tree
        except Exception as error:
            raise CheckpointError(
                f"{path}: no whole Orbax checkpoint: {error}"
            ) from error
        flat, _ = jax.tree_util.tree_flatten_with_path(self._tree)
        self._treedef: Any = jax.tree.structure(self._tree)
        self.tensors = {_name(key): self._spec(key, leaf) for key, leaf in flat}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """See ``Checkpoint``."""
        skip = self._orbax.PLACEHOLDER
        spec = self.tensors[name]
        wanted = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        item = self._treedef.unflatten(
            wanted if other == name else skip for other in self.tensors
        )
        as_numpy = self._orbax.RestoreArgs(restore_type=np.ndarray)
        args = self._orbax.args.PyTreeRestore(
            item=item, restore_args=jax.tree.map(lambda _: as_numpy, item)
        )
        try:
            tree = self._checkpointer.restore(self._step, args=args)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: the tensor {name!r} cannot be read: {error}"
            ) from error
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf is not skip]
        return np.asarray(leaves[0]).reshape(-1)[start:stop]

    def writer(self, output: pathlib.Path, specs: dict[str, Spec]) -> "_OrbaxWriter":
        """See ``Checkpoint``."""
        leaves = [name if name in specs else None for name in self.tensors]
        tree = _pruned(self._treedef.unflatten(leaves))
        return _OrbaxWriter(output, specs, tree, self._saving)

    def _saving(self, specs: dict[str, Spec]) -> Any:
        """A checkpointer that has little more than the largest tensor in memory."""
        largest = max(spec.nbytes for spec in specs.values())
        handler = self._orbax.PyTreeCheckpointHandler(
            save_concurrent_gb=math.ceil(largest / 1e9) or 1
        )
        return self._orbax.Checkpointer(handler)

    def close(self) -> None:
        """See ``Checkpoint``."""
        self._checkpointer.close()

    def _spec(self, key: Any, leaf: Any) -> Spec:
        shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: the leaf {_name(key)!r} is no array, but "
                f"{type(leaf).__name__}; average the directory of the weights alone"
            )
        return Spec(jnp.dtype(dtype), tuple(shape or ()))


class _OrbaxWriter:
    """Writes a tree of the first checkpoint's structure."""

    def __init__(
        self,
        output: pathlib.Path,
        specs: dict[str, Spec],
        tree: Any,
        checkpointer: Callable[[dict[str, Spec]], Any],
    ) -> None:
        self._output, self._specs, self._tree = output, specs, tree
        self._checkpointer = checkpointer

    def __enter__(self) -> Self:
        """See ``Writer``."""
        check_absent(self._output)
        self._file = tempfile.TemporaryFile(dir=self._output.parent)
        size = sum(_padded(spec.nbytes) for spec in self._specs.values())
        os.truncate(self._file.fileno(), size)
        self._arrays: dict[str, np.ndarray] = {}
        self._end = 0
        return self

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        """See ``Writer``."""
        spec, begin = self._specs[name], self._end
        self._file.seek(begin)
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).view(np.uint8).data)
        self._file.flush()
        self._end += _padded(spec.nbytes)
        if not spec.nbytes:
            self._arrays[name] = np.zeros(spec.shape, spec.dtype)
            return
        raw = np.memmap(self._file, np.uint8, "r", begin, (spec.nbytes,))
        self._arrays[name] = np.asarray(raw).view(spec.dtype).reshape(spec.shape)

    def finish(self) -> None:
        """See ``Writer``."""
        tree = jax.tree.map(lambda name: _as_jax(self._arrays[name]), self._tree)
        with hidden_folder(self._output.absolute()) as folder:
            with self._checkpointer(self._specs) as checkpointer:
                checkpointer.save(folder / "tree", tree)
            (folder / "tree").rename(self._output)

    def __exit__(self, *error: object) -> None:
        """See ``Writer``."""
        self._file.close()


def _as_jax(x: np.ndarray) -> Any:
    """The same memory as JAX's array, of which Orbax makes no copy before it writes."""
    if not x.size or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x
    cpu = jax.local_devices(backend="cpu")[0]
    return jax.device_put(x, cpu, may_alias=True)


def _name(key: Any) -> str:
    """As Orbax calls a leaf, ``params.dense.kernel``."""
    return jax.tree_util.keystr(key, simple=True, separator=".")


def _padded(size: int) -> int:
    """A whole number of pages, on which memory maps begin."""
    return math.ceil(size / 4096) * 4096


def _pruned(tree: Any) -> Any:
    """Without the branches of dictionaries that have no leaf left."""
    if not isinstance(tree, dict):
        return tree
    kept = {key: _pruned(branch) for key, branch in tree.items()}
    return {key: x for key, x in kept.items() if jax.tree.leaves(x) or x == {}}
