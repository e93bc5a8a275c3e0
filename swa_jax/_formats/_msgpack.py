"""Flax's msgpack files, as ``flax.serialization.to_bytes`` makes them.

Maps of maps, https://github.com/msgpack/msgpack/blob/master/spec.md, with tensors as
extensions: type 1 an array, type 3 a NumPy scalar, each a packed (shape, name of the
dtype, numbers). A tensor of more than a gigabyte is a map of flattened parts. The
library ``msgpack`` holds every tensor in memory as a whole; here the file is walked
once for the places of the numbers.
"""

import os
import pathlib
import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from swa_jax._formats._place import Draft
from swa_jax._formats._tensors import Spec
from swa_jax.errors import CheckpointError

_ARRAY, _SCALAR = 1, 3  # types of extensions
_CHUNKED = "__msgpack_chunked_array__"
#: Bytes above which Flax stores a tensor in parts, and of each part.
_MAX_PART = 2**30
#: For a first byte: what it begins, and the bytes of the length that follows.
_LENGTHS = {
    **{0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4)},
    **{0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)},
    **{0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4)},
    **{0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}
_NUMBERS = {
    **{0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"},
    **{0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
#: How numbers of Python's are written, by the kind of their dtype.
_FORMATS = {"b": ">B", "i": ">Bq", "u": ">BQ", "f": ">Bd"}


class _Tensor(NamedTuple):
    """Where the numbers of a tensor are.

    Attributes:
      spec: its dtype and shape.
      parts: the first byte and the elements of each part.
      code: of its extension.
    """

    spec: Spec
    parts: list[tuple[int, int]]
    code: int = _ARRAY


class _Number(NamedTuple):
    """A number of Python's, a tensor without dimensions."""

    value: int | float

    @property
    def spec(self) -> Spec:
        """As NumPy takes it."""
        return Spec(np.asarray(self.value).dtype, ())


class MsgpackFile:
    """One file.

    Numbers of Python's are tensors too, integers of int64 and floats of float64. What
    else there is (``None``, text) is no tensor; the output has that of the file that
    makes the writer.
    """

    in_pieces = True

    def __init__(self, path: pathlib.Path) -> None:
        """Opens it, and finds out what is where."""
        self.path = path
        self._file = path.open("rb")
        try:
            self._tree = _Walk(path, self._file).tree()
            self._places = _named(path, self._tree)
        except BaseException:
            self._file.close()
            raise
        self.tensors = {name: leaf.spec for name, leaf in self._places.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """See ``Checkpoint``."""
        leaf = self._places[name]
        if isinstance(leaf, _Number):
            return np.asarray([leaf.value], leaf.spec.dtype)[start:stop]
        dtype, found, begin = leaf.spec.dtype, [np.zeros(0, leaf.spec.dtype)], 0
        for at, size in leaf.parts:
            low, high = max(start - begin, 0), min(stop - begin, size)
            begin += size
            if low < high:
                self._file.seek(at + low * dtype.itemsize)
                data = self._file.read((high - low) * dtype.itemsize)
                if len(data) != (high - low) * dtype.itemsize:
                    raise CheckpointError(
                        f"{self.path}: became shorter while it was read"
                    )
                found.append(np.frombuffer(data, dtype))
        return found[1] if len(found) == 2 else np.concatenate(found)

    def writer(self, output: pathlib.Path, specs: dict[str, Spec]) -> "_MsgpackWriter":
        """See ``Checkpoint``."""
        return _MsgpackWriter(output, list(_plan(self._tree, (), specs, self.tensors)))

    def close(self) -> None:
        """See ``Checkpoint``."""
        self._file.close()


def is_msgpack(path: pathlib.Path) -> bool:
    """Whether a file is to be read as one of these, or as one of safetensors."""
    if path.suffix in (".msgpack", ".safetensors"):
        return path.suffix == ".msgpack"
    with path.open("rb") as file:
        start = file.read(9)
    # In safetensors the length of its header, in eight bytes, precedes a JSON object.
    if start[4:] == bytes(4) + b"{":
        return False
    return start[:1] >= b"\x80" and (start[0] < 0x90 or start[0] in (0xDE, 0xDF))


def _named(path: pathlib.Path, tree: Any) -> dict[str, _Tensor | _Number]:
    """The tensors by name, ``params.dense.kernel``, in the order of the file."""
    found: dict[str, _Tensor | _Number] = {}

    def collect(node: Any, keys: tuple[str, ...]) -> None:
        for key, branch in _items(node):
            collect(branch, (*keys, key))
        if isinstance(node, _Tensor | _Number):
            name = ".".join(keys)
            if name in found:
                raise CheckpointError(f"{path}: has two tensors of the name {name!r}")
            found[name] = node

    collect(tree, ())
    if not found:
        raise CheckpointError(f"{path}: holds no tensor")
    return found


def _items(node: Any) -> list[tuple[str, Any]]:
    """The branches of a map or list, with their keys."""
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, list):
        return [(str(i), branch) for i, branch in enumerate(node)]
    return []


class _Walk:
    """Reads the structure of a file, and passes over the numbers."""

    def __init__(self, path: pathlib.Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size

    def tree(self) -> Any:
        """Dicts, lists, ``_Tensor``, ``_Number``, text, bytes and ``None``.

        Raises:
          CheckpointError: the file is damaged, or holds what cannot be read.
        """
        try:
            found = self._value()
        except RecursionError:
            raise self._damaged("maps in maps without end") from None
        if self._file.tell() != self._size:
            raise self._damaged(f"it goes on after its end, byte {self._file.tell():,}")
        return found

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: no msgpack file, or a damaged one: {what}"
        )

    def _bytes(self, count: int) -> bytes:
        self._check_there(count)
        return self._file.read(count)

    def _check_there(self, count: int) -> None:
        needed = self._file.tell() + count
        if needed > self._size:
            raise CheckpointError(
                f"{self._path}: no msgpack file, or a truncated one: it has "
                f"{self._size:,} bytes, where {needed:,} are needed"
            )

    def _unpacked(self, code: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def _head(self) -> tuple[str, int]:
        """What begins, and its length; of a plain value its first byte."""
        first = self._bytes(1)[0]
        if first in _LENGTHS:
            kind, width = _LENGTHS[first]
            return kind, int.from_bytes(self._bytes(width), "big")
        if 0xA0 <= first <= 0xBF:
            return "str", first & 0x1F
        if 0x80 <= first <= 0x9F:
            return "map" if first < 0x90 else "list", first & 0xF
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        return "plain", first

    def _value(self) -> Any:
        kind, length = self._head()
        if kind == "map":
            return self._map(length)
        if kind == "list":
            return [self._value() for _ in range(length)]
        if kind == "str":
            return self._text(length)
        if kind == "bin":
            return self._bytes(length)
        return self._extension(length) if kind == "ext" else self._plain(length)

    def _text(self, length: int) -> str:
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._damaged(f"no text ends at byte {self._file.tell():,}") from None

    def _map(self, length: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(length):
            kind, size = self._head()
            if kind != "str":
                raise self._damaged(f"a key at byte {self._file.tell():,} is no text")
            key = self._text(size)
            if key in found:
                raise self._damaged(f"a map has the key {key!r} twice")
            found[key] = self._value()
        return self._joined(found) if _CHUNKED in found else found

    def _plain(self, first: int) -> _Number | None:
        if first in _CONSTANTS:
            value = _CONSTANTS[first]
            return None if value is None else _Number(value)
        if first in _NUMBERS:
            return _Number(self._unpacked(_NUMBERS[first]))
        if 0x80 <= first < 0xE0:
            raise self._damaged(f"byte {self._file.tell():,} begins nothing")
        return _Number(first if first < 0x80 else first - 256)

    def _extension(self, length: int) -> _Tensor:
        code = self._unpacked(">b")
        self._check_there(length)
        end = self._file.tell() + length
        if code not in (_ARRAY, _SCALAR):
            raise CheckpointError(
                f"{self._path}: what ends at byte {end:,} is an extension of type "
                f"{code}, no array; average a file of the weights alone"
            )
        kind, count = self._head()
        shape: Any = None
        name, size = None, -1
        if (kind, count) == ("list", 3):
            shape, name, (kind, size) = self._value(), self._value(), self._head()
        at = self._file.tell()
        try:
            spec = Spec(jnp.dtype(name), tuple(n.value for n in shape))
            numbers = spec.dtype == bool or jnp.issubdtype(spec.dtype, jnp.number)
            if not numbers or (kind, at + size, size) != ("bin", end, spec.nbytes):
                raise ValueError
        except (TypeError, ValueError, AttributeError):
            raise self._damaged(
                f"no tensor of dtype {name!r:.20} ends at byte {end:,}"
            ) from None
        self._file.seek(end)
        return _Tensor(spec, [(at, spec.size)], code)

    def _joined(self, found: dict[str, Any]) -> _Tensor:
        """A tensor in parts."""
        try:
            shape = [n.value for _, n in sorted(found["shape"].items(), key=_place)]
            parts = [part for _, part in sorted(found["chunks"].items(), key=_place)]
            spec = Spec(parts[0].spec.dtype, tuple(shape))
            sizes = [part.spec.size for part in parts if part.spec.dtype == spec.dtype]
            if len(sizes) < len(parts) or sum(sizes) != spec.size:
                raise ValueError
            return _Tensor(spec, [part.parts[0] for part in parts])
        except (TypeError, KeyError, IndexError, AttributeError, ValueError):
            raise self._damaged("the parts of a tensor make no whole") from None


def _place(item: tuple[str, Any]) -> int:
    return int(item[0])


class _MsgpackWriter:
    """Writes what was planned: bytes, and between them the numbers of tensors."""

    def __init__(self, output: pathlib.Path, plan: "list[bytes | _Gap]") -> None:
        self._draft, self._plan = Draft(output), iter(plan)
        self._size = sum(x.size if isinstance(x, _Gap) else len(x) for x in plan)

    def __enter__(self) -> Self:
        """See ``Writer``."""
        self._file = self._draft.open(self._size)
        return self

    def write(self, name: str, blocks: Iterator[np.ndarray]) -> None:
        """See ``Writer``."""
        gap = self._up_to_gap()
        left = 0 if gap is None else gap.size
        for block in blocks:
            data = np.ascontiguousarray(block).view(np.uint8).data
            if gap is not None and gap.kind:
                data = memoryview(_plain(gap.kind, np.asarray(block).item()))
            while len(data):
                self._file.write(data[:left])
                left, data = left - len(data[:left]), data[left:]
                if not left and len(data):  # the next part of it
                    gap = self._up_to_gap()
                    assert gap is not None, name
                    left = gap.size

    def finish(self) -> None:
        """See ``Writer``."""
        end = self._up_to_gap()
        assert end is None
        self._draft.finish()

    def _up_to_gap(self) -> "_Gap | None":
        for piece in self._plan:
            if isinstance(piece, _Gap):
                return piece
            self._file.write(piece)
        return None

    def __exit__(self, *error: object) -> None:
        """See ``Writer``."""
        self._draft.close()


class _Gap(NamedTuple):
    """Room for the numbers of a tensor, or of a part of it.

    Attributes:
      size: its bytes.
      kind: that of the dtype, for a number of Python's.
    """

    size: int
    kind: str = ""


def _plan(
    node: Any, keys: tuple[str, ...], specs: dict[str, Spec], there: dict[str, Spec]
) -> Iterator[bytes | _Gap]:
    """The pieces of a file that has only these tensors of the ones that are there."""
    branches = [
        (key, branch)
        for key, branch in _items(node)
        if len(specs) == len(there) or _has(branch, (*keys, key), specs)
    ]
    if isinstance(node, dict | list):
        yield _begun("map" if isinstance(node, dict) else "list", len(branches))
        for key, branch in branches:
            if isinstance(node, dict):
                yield _packed(key)
            yield from _plan(branch, (*keys, key), specs, there)
    elif isinstance(node, _Tensor):
        yield from _tensor(specs[".".join(keys)], node.code)
    elif isinstance(node, _Number):
        kind = node.spec.dtype.kind
        yield _Gap(struct.calcsize(_FORMATS[kind]), kind)
    else:
        yield _packed(node)


def _has(node: Any, keys: tuple[str, ...], specs: dict[str, Spec]) -> bool:
    """Whether one of these tensors is in it."""
    if isinstance(node, _Tensor | _Number):
        return ".".join(keys) in specs
    return any(_has(branch, (*keys, key), specs) for key, branch in _items(node))


def _tensor(spec: Spec, code: int) -> Iterator[bytes | _Gap]:
    if spec.nbytes <= _MAX_PART:
        yield from _extension(spec, code)
        return
    step = _MAX_PART // spec.dtype.itemsize
    sizes = [min(step, spec.size - start) for start in range(0, spec.size, step)]
    yield _begun("map", 3) + _packed(_CHUNKED) + _plain("b", True)
    yield _packed("shape") + _begun("map", len(spec.shape))
    for i, dim in enumerate(spec.shape):
        yield _packed(str(i)) + _plain("i", dim)
    yield _packed("chunks") + _begun("map", len(sizes))
    for i, size in enumerate(sizes):
        yield _packed(str(i))
        yield from _extension(Spec(spec.dtype, (size,)), code)


def _extension(spec: Spec, code: int) -> Iterator[bytes | _Gap]:
    head = _begun("list", 3) + _begun("list", len(spec.shape))
    head += b"".join(_plain("i", dim) for dim in spec.shape)
    head += _packed(spec.dtype.name) + _begun("bin", spec.nbytes)
    yield _begun("ext", len(head) + spec.nbytes) + struct.pack(">b", code) + head
    yield _Gap(spec.nbytes)


def _begun(kind: str, length: int) -> bytes:
    """The beginning of something of this length."""
    first = next(byte for byte, found in _LENGTHS.items() if found == (kind, 4))
    return struct.pack(">BI", first, length)


def _plain(kind: str, value: Any) -> bytes:
    """A number of Python's."""
    if kind == "b":
        return b"\xc3" if value else b"\xc2"
    first = {"i": 0xD3, "u": 0xCF, "f": 0xCB}[kind]
    return struct.pack(_FORMATS[kind], first, value)


def _packed(value: str | bytes | None) -> bytes:
    if value is None:
        return b"\xc0"
    data = value.encode() if isinstance(value, str) else value
    return _begun("str" if isinstance(value, str) else "bin", len(data)) + data
