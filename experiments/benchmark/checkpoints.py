"""(h): averaging checkpoints on disk."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from experiments.benchmark.measuring import Line, Options, compare

_COUNT = 4
_KINDS = ("safetensors", "msgpack", "orbax")
#: Both in a process of their own; the first tells its peak of memory, Python and JAX
#: included.
_AVERAGE = """
import json, pathlib, re, sys, threading, time
import swa_jax
folder, tiny, *paths = map(pathlib.Path, sys.argv[1:])
status, peak = pathlib.Path("/proc/self/status"), [0]
def watch():  # its own memory, without files that are mapped into it
    while status.exists():
        found = re.search(r"RssAnon:\\s+(\\d+) kB", status.read_text())
        peak[0] = max(peak[0], 1024 * int(found[1]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
swa_jax.average_checkpoints([tiny] * 2, folder / "small")
start = time.perf_counter()
swa_jax.average_checkpoints(paths, folder / "out")
print(json.dumps([time.perf_counter() - start, peak[0]]))
"""
#: The same bytes read, and as many written.
_COPY = """
import json, os, pathlib, sys, time
folder, tiny, *paths = map(pathlib.Path, sys.argv[1:])
start, size = time.perf_counter(), 2**24
with (folder / "out").open("wb") as out:
    for number, path in enumerate(paths):
        for each in [path, *path.rglob("*")]:
            if each.is_dir():
                continue
            with each.open("rb") as file:
                while data := file.read(size):
                    if number == 0:
                        out.write(data)
    out.flush()
    os.fsync(out.fileno())
print(json.dumps([time.perf_counter() - start, 0]))
"""


def checkpoints(options: Options) -> Iterator[Line]:
    """(h) `average_checkpoints` against a plain copy, and the memory that it takes."""
    for kind in _KINDS:
        with tempfile.TemporaryDirectory(dir=options.scratch) as name:
            yield _compared(options, kind, pathlib.Path(name))


def _compared(options: Options, kind: str, folder: pathlib.Path) -> Line:
    size = options.checkpoint_bytes
    paths = [_write(folder, kind, "tiny", 0, 1024)]
    paths += [_write(folder, kind, str(i), i, size) for i in range(_COUNT)]
    seconds: dict[str, list[float]] = {_AVERAGE: [], _COPY: []}
    peak = 0
    for number in range(options.rounds + 1):
        for script in seconds:
            took, memory = _run(script, folder, paths)
            peak = max(peak, memory)
            if number:  # the first reads from the disk
                seconds[script].append(took)
    return compare(
        "h",
        f"time of average_checkpoints, {_COUNT} of {size / 1e9:g} GB, {kind}, over a "
        "plain copy",
        (seconds[_AVERAGE], seconds[_COPY]),
        "at most 1.5",
        f"peak of memory, Python and JAX included: {peak / 1e6:.0f} MB",
    )


def _write(
    folder: pathlib.Path, kind: str, name: str, seed: int, size: int
) -> pathlib.Path:
    """A model whose largest tensor is a quarter of it, the rest in sixteenths."""
    part = np.random.default_rng(seed).standard_normal(size // 64, np.float32)
    tensors = {f"layer_{i}": part + i for i in range(12)}
    tensors["embedding"] = np.concatenate([part] * 4).reshape(4, -1)
    path = folder / name
    if kind == "safetensors":
        import safetensors.numpy

        safetensors.numpy.save_file(tensors, path)
    elif kind == "msgpack":
        from flax import serialization

        path.write_bytes(serialization.msgpack_serialize(tensors))
    else:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tensors)
    return path


def _run(
    script: str, folder: pathlib.Path, paths: list[pathlib.Path]
) -> tuple[float, int]:
    command = [sys.executable, "-c", script, str(folder), *map(str, paths)]
    took, memory = json.loads(subprocess.check_output(command))
    for name in ("out", "small"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return took, memory
