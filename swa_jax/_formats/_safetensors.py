"""Safetensors, read and written in pieces; one file, or Hugging Face's shards.

The library ``safetensors`` writes only what is in memory as a whole. The format is
simple: eight bytes with the length of a JSON header (little-endian), the header, then
the numbers of all tensors without a gap. The header gives each tensor's dtype, shape
and place in the numbers; see https://huggingface.co/docs/safetensors/index.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any, Self

import jax.numpy as jnp
import numpy as np

from swa_jax._formats._place import Draft, check_absent, hidden_folder
from swa_jax._formats._tensors import Spec
from swa_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
#: The largest header that the library reads.
_MAX_HEADER = 100_000_000
_DTYPES = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}
_CODES = {name: code for code, name in _DTYPES.items()}


class SafetensorsFile:
    """One file."""

    in_pieces = True

    def __init__(self, path: pathlib.Path) -> None:
        """Opens it, and reads and checks its header."""
        self.path = path
        self._file = path.open("rb")
        try:
            header, self._begin = _read_header(path, self._file)
            self.metadata = header.pop("__metadata__", None)
            size = os.fstat(self._file.fileno()).st_size - self._begin
            self._places, self.tensors = _check_tensors(path, header, size)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """See ``Checkpoint``."""
        dtype = self.tensors[name].dtype
        self._file.seek(self._begin + self._places[name] + start * dtype.itemsize)
        wanted = (stop - start) * dtype.itemsize
        data = self._file.read(wanted)
        if len(data) != wanted:
            raise CheckpointError(f"{self.path}: became shorter while it was read")
        return np.frombuffer(data, dtype)

    def writer(self, output: pathlib.Path, specs: dict[str, Spec]) -> "_FileWriter":
        """See ``Checkpoint``."""
        return _FileWriter(output, specs, self.metadata)

    def close(self) -> None:
        """See ``Checkpoint``."""
        self._file.close()


class SafetensorsShards:
    """A directory with Hugging Face's index, and the files that it names."""

    in_pieces = True

    def __init__(self, path: pathlib.Path) -> None:
        """Opens all of them."""
        self.path = path
        self._index = _read_index(path / INDEX)
        self._home: dict[str, str] = self._index["weight_map"]
        self._files: dict[str, SafetensorsFile] = {}
        with contextlib.ExitStack() as opened:
            for name in dict.fromkeys(self._home.values()):
                self._files[name] = file = _open_shard(path, name)
                opened.callback(file.close)
            self.tensors = self._check()
            self.close = opened.pop_all().close

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """See ``Checkpoint``."""
        return self._files[self._home[name]].read(name, start, stop)

    def writer(self, output: pathlib.Path, specs: dict[str, Spec]) -> "_ShardsWriter":
        """See ``Checkpoint``."""
        home = {name: self._home[name] for name in specs}
        metadata = {name: file.metadata for name, file in self._files.items()}
        return _ShardsWriter(output, specs, self._index, home, metadata)

    def _check(self) -> dict[str, Spec]:
        """All tensors, file by file; raises where index and files disagree."""
        tensors = {}
        for file_name, file in self._files.items():
            for name, spec in file.tensors.items():
                if self._home.get(name) != file_name:
                    raise CheckpointError(
                        f"{file.path}: holds the tensor {name!r}, which {INDEX} "
                        f"{'does not name' if name not in self._home else 'puts into '}"
                        f"{self._home.get(name, '')}"
                    )
                tensors[name] = spec
        for name, file_name in self._home.items():
            if name not in tensors:
                raise CheckpointError(
                    f"{self.path / file_name}: lacks the tensor {name!r}, which "
                    f"{INDEX} puts there"
                )
        return tensors


def _open_shard(path: pathlib.Path, name: str) -> SafetensorsFile:
    if pathlib.PurePath(name).name != name:
        raise CheckpointError(f"{path / INDEX}: {name!r} is no name of a file in it")
    try:
        return SafetensorsFile(path / name)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path / name}: not there, but named in {INDEX}; download all shards"
        ) from None


def _read_index(path: pathlib.Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        home = index["weight_map"]
        if not (home and all(isinstance(x, str) for x in (*home, *home.values()))):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(
            f"{path}: no index of shards, which has a weight_map from tensors to files"
        ) from None
    return index


def _read_header(path: pathlib.Path, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    data = file.read(length) if len(prefix) == 8 and length <= _MAX_HEADER else b""
    foreign = f"{path}: no safetensors file, or a truncated one: its header "
    if len(prefix) < 8 or length > _MAX_HEADER or len(data) < length:
        raise CheckpointError(f"{foreign}would have {length} bytes")
    try:
        header = json.loads(data)
        if not isinstance(header, dict):
            raise TypeError
    except (ValueError, TypeError):
        raise CheckpointError(f"{foreign}is no JSON object") from None
    return header, 8 + length


def _check_tensors(
    path: pathlib.Path, header: dict[str, Any], size: int
) -> tuple[dict[str, int], dict[str, Spec]]:
    """Where each tensor begins, and what it is, in the order of the numbers."""
    places: dict[str, int] = {}
    specs: dict[str, Spec] = {}
    end = 0
    found = [(*_parse(path, name, entry), name) for name, entry in header.items()]
    for begin, until, spec, name in sorted(found, key=lambda x: (x[0], x[1])):
        if begin != end or until - begin != spec.nbytes:
            raise CheckpointError(
                f"{path}: damaged, the tensor {name!r} of {spec} lies at bytes "
                f"{begin} to {until}, where {end} to {end + spec.nbytes} were expected"
            )
        places[name], specs[name], end = begin, spec, until
    if end != size:
        raise CheckpointError(
            f"{path}: {'truncated' if size < end else 'damaged'}, it has {size} bytes "
            f"of numbers, where its header says {end}"
        )
    return places, specs


def _parse(path: pathlib.Path, name: str, entry: Any) -> tuple[int, int, Spec]:
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        begin, until = entry["data_offsets"]
        if not all(type(x) is int and x >= 0 for x in (*shape, begin, until)):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: damaged, its header says of the tensor {name!r}: {entry!r:.80}"
        ) from None
    if code not in _DTYPES:
        raise CheckpointError(
            f"{path}: the tensor {name!r} has the dtype {code}, which cannot be "
            f"averaged; known are {', '.join(_DTYPES)}"
        )
    return begin, until, Spec(jnp.dtype(_DTYPES[code]), shape)


class _FileWriter:
    """Writes one file."""

    def __init__(
        self, output: pathlib.Path, specs: dict[str, Spec], metadata: Any
    ) -> None:
        self._draft = Draft(output)
        self._specs, self._metadata = specs, metadata

    def __enter__(self) -> Self:
        """See ``Writer``."""
        header = _header(self._specs, self._metadata)
        size = len(header) + sum(spec.nbytes for spec in self._specs.values())
        self._file = self._draft.open(size)
        self._file.write(header)
        return self

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        """See ``Writer``."""
        del name
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).view(np.uint8).data)

    def finish(self, output: pathlib.Path | None = None) -> None:
        """See ``Writer``."""
        self._draft.finish(output)

    def __exit__(self, *error: object) -> None:
        """See ``Writer``."""
        self._draft.close()


class _ShardsWriter:
    """Writes a directory: files like the first checkpoint's, and their index.

    The directory gets its name last; before, its files have none.
    """

    def __init__(
        self,
        output: pathlib.Path,
        specs: dict[str, Spec],
        index: dict[str, Any],
        home: dict[str, str],
        metadata: dict[str, Any],
    ) -> None:
        total = sum(spec.nbytes for spec in specs.values())
        about = {**index.get("metadata", {}), "total_size": total}
        self._index = {**index, "metadata": about, "weight_map": home}
        self._output, self._specs = output, specs
        self._home, self._metadata = home, metadata

    def __enter__(self) -> Self:
        """See ``Writer``."""
        check_absent(self._output)
        self._open = contextlib.ExitStack()
        self._drafts = {}
        try:
            for file_name in dict.fromkeys(self._home.values()):
                mine = {
                    name: spec
                    for name, spec in self._specs.items()
                    if self._home[name] == file_name
                }
                # Beside the directory, which is not there yet.
                beside = self._output.parent / f".{self._output.name}.{file_name}"
                writer = _FileWriter(beside, mine, self._metadata[file_name])
                self._drafts[file_name] = self._open.enter_context(writer)
        except BaseException:
            self._open.close()
            raise
        return self

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        """See ``Writer``."""
        self._drafts[self._home[name]].write(name, blocks)

    def finish(self) -> None:
        """See ``Writer``."""
        with hidden_folder(self._output) as hidden:
            folder = hidden / "shards"
            folder.mkdir()
            for file_name, writer in self._drafts.items():
                writer.finish(folder / file_name)
            text = json.dumps(self._index, indent=2, sort_keys=True)
            (folder / INDEX).write_text(f"{text}\n")
            folder.rename(self._output)

    def __exit__(self, *error: object) -> None:
        """See ``Writer``."""
        self._open.close()


def _header(specs: dict[str, Spec], metadata: Any) -> bytes:
    """The header, padded so that the numbers begin at a multiple of eight bytes."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        entries[name] = {
            "dtype": _CODES[spec.dtype.name],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
