"""``average_checkpoints()``: a soup of models that lie on disk."""

import collections
import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from swa_jax._formats import Checkpoint, Spec, open_checkpoint
from swa_jax._validate import check_floating, is_averaged, shown
from swa_jax.averages.soups import check_shares, mean_of
from swa_jax.errors import CheckpointError, NonFiniteError

#: Bytes of one tensor of one checkpoint that are in memory at a time.
_BLOCK = 2**22


def average_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    keys: Callable[[str], bool] | Iterable[str] | None = None,
    dtype: DTypeLike | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> pathlib.Path:
    """Averages checkpoints on disk: ``soup`` for models that do not fit in memory.

    Tensors are read, averaged and written in pieces, so memory grows neither with the
    number of checkpoints nor with their size. The result is, bit for bit, that of
    ``soup`` on the loaded models, in their dtypes. Tensors that are not floating
    (counters, masks) are those of the last checkpoint.

    Formats: safetensors, a file or a directory with ``model.safetensors`` or with
    Hugging Face's shards and index; msgpack of ``flax.serialization.to_bytes``, or a
    directory with ``flax_model.msgpack``; Orbax, a step's directory or the root of a
    ``CheckpointManager``, whose latest step is taken (extra ``checkpoints``; tensors
    are read whole, one at a time, and the output waits on disk twice until it is
    written). The output is of the first one's kind. Numbers of Python's in msgpack are
    tensors of int64 and float64, whatever else there is (text, ``None``) is the first
    checkpoint's.

    Args:
      paths: the checkpoints, alike in their tensors.
      output: file or directory to make. It appears whole, or not at all, and nothing is
        ever replaced.
      weights: a number for each checkpoint, see ``soup``; ``decay_weights`` makes some.
      keys: the tensors to take, by name: names, or a predicate. By default all.
      dtype: floating dtype of the floating tensors in the output; by default each its
        own. Only then may their dtypes differ between checkpoints.
      progress: called with the bytes written so far and those of the whole output.

    Returns:
      The path of the output.

    Raises:
      CheckpointError: a checkpoint is damaged or of no known kind, or tensors are
        missing, surplus, of another shape or of another dtype; named, before anything
        is written.
      NonFiniteError: a tensor has a NaN or an infinity, or its average has.
      FileExistsError: there is something at ``output``.
      FileNotFoundError: there is nothing at one of ``paths``.
      OSError: the disk has no room, or a file cannot be read.
      ValueError: no path, or ``weights`` that do not fit, see ``soup``.
      ImportError: an Orbax checkpoint without ``orbax-checkpoint``.
      TypeError: a single path, or ``dtype`` is no floating dtype.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np, safetensors.numpy, swa_jax
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for i in (1, 2, 6):
      ...     tensors = {"w": np.full(3, i, np.float32)}
      ...     safetensors.numpy.save_file(tensors, folder / f"{i}.safetensors")
      >>> paths = sorted(folder.glob("*.safetensors"))
      >>> out = swa_jax.average_checkpoints(paths, folder / "mean.safetensors")
      >>> print(safetensors.numpy.load_file(out)["w"])
      [3. 3. 3.]

    References:
      Wortsman et al., Model soups, ICML 2022, https://arxiv.org/abs/2203.05482.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(
            f"average_checkpoints: paths must be several, got {str(paths)!r}; pass a "
            "list of paths"
        )
    inputs, target = list(map(pathlib.Path, paths)), pathlib.Path(output)
    if not inputs:
        raise ValueError("average_checkpoints: paths is empty; pass one at least")
    if weights is not None:
        weights = check_shares(weights, len(inputs))
    kept = None if dtype is None else check_floating("dtype", dtype)
    with contextlib.ExitStack() as opened:
        checkpoints = [_opened(path, opened) for path in inputs]
        # One thread, which leaves the files before they are closed.
        reader = opened.enter_context(futures.ThreadPoolExecutor(1))
        names = _chosen(checkpoints[0], keys)
        for checkpoint in checkpoints[1:]:
            _check_alike(checkpoint, checkpoints[0], names, kept is not None)
        specs = {name: _kept_as(checkpoints[0].tensors[name], kept) for name in names}
        writer = opened.enter_context(checkpoints[0].writer(target, specs))
        done, total = 0, sum(spec.nbytes for spec in specs.values())
        for name, spec in specs.items():
            writer.write(name, _averaged(reader, checkpoints, name, spec, weights))
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
        writer.finish()
    return target


def _opened(path: pathlib.Path, opened: contextlib.ExitStack) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    opened.callback(checkpoint.close)
    return checkpoint


def _chosen(checkpoint: Checkpoint, keys: Any) -> list[str]:
    """The tensors to take, in the order of the first checkpoint."""
    there = checkpoint.tensors
    if keys is None:
        return list(there)
    if callable(keys):
        chosen = [name for name in there if keys(name)]
    else:
        wanted = {keys} if isinstance(keys, str) else set(keys)
        chosen = [name for name in there if name in wanted]
        if lacking := sorted(wanted - there.keys()):
            raise CheckpointError(
                f"{checkpoint.path}: lacks the tensor {lacking[0]!r}, which keys asks "
                f"for; it has {_some(there)}"
            )
    if not chosen:
        raise CheckpointError(
            f"{checkpoint.path}: keys chooses none of its tensors, {_some(there)}"
        )
    return chosen


def _check_alike(
    checkpoint: Checkpoint, first: Checkpoint, names: list[str], mixed: bool
) -> None:
    found, expected = checkpoint.tensors, first.tensors
    for name in names:
        if name not in found:
            raise CheckpointError(
                f"{checkpoint.path}: lacks the tensor {name!r}, which {first.path} has"
            )
        got, want = found[name], expected[name]
        floating = is_averaged(got.dtype) and is_averaged(want.dtype)
        if got.shape != want.shape or (
            got.dtype != want.dtype and not (mixed and floating)
        ):
            fix = (
                "; pass dtype= (or --dtype) to average them in one"
                if got.shape == want.shape and floating
                else ""
            )
            raise CheckpointError(
                f"{checkpoint.path}: the tensor {name!r} is {got}, in {first.path} "
                f"{want}{fix}"
            )
    if len(names) == len(expected) and (surplus := found.keys() - expected.keys()):
        raise CheckpointError(
            f"{checkpoint.path}: has the tensor {min(surplus)!r}, which {first.path} "
            "lacks; choose tensors by keys= (or --keys) to leave it out"
        )


def _kept_as(spec: Spec, dtype: np.dtype | None) -> Spec:
    change = dtype is not None and jnp.issubdtype(spec.dtype, jnp.floating)
    return spec._replace(dtype=dtype) if change and dtype is not None else spec


def _averaged(
    reader: futures.Executor,
    checkpoints: list[Checkpoint],
    name: str,
    spec: Spec,
    weights: Sequence[float] | None,
) -> Iterator[np.ndarray]:
    """The pieces of one tensor."""
    step, ahead = max(1, _BLOCK // max(spec.dtype.itemsize, 4)), 2
    if not all(checkpoint.in_pieces for checkpoint in checkpoints):
        step, ahead = max(spec.size, 1), 0
    blocks = [
        (start, min(start + step, spec.size)) for start in range(0, spec.size, step)
    ]
    sources = checkpoints if is_averaged(spec.dtype) else checkpoints[-1:]
    pieces = _read(reader, sources, name, blocks, ahead)
    for start, stop in blocks:
        if not is_averaged(spec.dtype):
            yield next(pieces)
            continue
        mine = itertools.islice(pieces, len(checkpoints))
        block = _mean(mine, stop - start, checkpoints, name, weights)
        block = block.astype(spec.dtype, copy=False)
        if not np.isfinite(block).all():
            again = _read(reader, checkpoints, name, [(start, stop)], 0)
            raise NonFiniteError(_not_finite(checkpoints, name, start, again))
        yield block


def _read(
    reader: futures.Executor,
    checkpoints: list[Checkpoint],
    name: str,
    blocks: list[tuple[int, int]],
    ahead: int,
) -> Iterator[np.ndarray]:
    """Block by block from all checkpoints; the next ones while one is being used."""
    waiting: collections.deque[futures.Future[np.ndarray]] = collections.deque()
    for block, checkpoint in itertools.product(blocks, checkpoints):
        waiting.append(reader.submit(checkpoint.read, name, *block))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _mean(
    pieces: Iterator[np.ndarray],
    length: int,
    checkpoints: list[Checkpoint],
    name: str,
    weights: Sequence[float] | None,
) -> np.ndarray:
    # Few sizes, for each is compiled: powers of two, filled up with zeros. Not of what
    # is large, and read as a whole.
    size = 1 << (length - 1).bit_length() if length <= _BLOCK else length

    def filled(piece: np.ndarray) -> np.ndarray:
        filler = np.zeros(size - len(piece), piece.dtype)
        return np.concatenate([piece, filler]) if filler.size else piece

    wide = any(
        checkpoint.tensors[name].dtype.name == "float64" for checkpoint in checkpoints
    )
    with jax.enable_x64(wide), jax.default_device(jax.local_devices(backend="cpu")[0]):
        mean, _ = mean_of(map(filled, pieces), weights)
        return np.asarray(mean)[:length]


def _not_finite(
    checkpoints: list[Checkpoint],
    name: str,
    start: int,
    pieces: Iterator[np.ndarray],
) -> str:
    for checkpoint, piece in zip(checkpoints, pieces, strict=True):
        bad = np.flatnonzero(~np.isfinite(piece))
        if bad.size:
            return (
                f"{checkpoint.path}: the tensor {name!r} has a NaN or an infinity, at "
                f"element {start + int(bad[0]):,}; leave this checkpoint out"
            )
    return (
        f"the average of the tensor {name!r} is too large for its dtype, element "
        f"{start:,} and on; choose a wider dtype, or smaller weights"
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return shown(", ".join(listed[:3])).strip("'") + more
