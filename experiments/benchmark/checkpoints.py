"""(h): averaging checkpoints on disk."""

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import safetensors.numpy

from experiments.benchmark.measuring import Line, Options, compare

_COUNT = 4
#: In a process of its own, for its peak of memory, Python and JAX included.
_AVERAGE = """
import json, pathlib, re, sys, time
import numpy as np, safetensors.numpy, swa_jax
folder, *paths = map(pathlib.Path, sys.argv[1:])
def peak():  # not getrusage's, which begins with the parent's
    status = pathlib.Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(r"VmHWM:\\s+(\\d+) kB", text)
    return 1024 * int(found[1]) if found else 0
tiny = folder / "tiny.safetensors"
safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, tiny)
swa_jax.average_checkpoints([tiny] * 2, folder / "small.safetensors")
start = time.perf_counter()
swa_jax.average_checkpoints(paths, folder / "out.safetensors")
print(json.dumps([time.perf_counter() - start, peak()]))
"""
#: The same bytes read, and as many written.
_COPY = """
import json, os, pathlib, sys, time
folder, *paths = map(pathlib.Path, sys.argv[1:])
start, size = time.perf_counter(), 2**24
with (folder / "out.safetensors").open("wb") as out:
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            while data := file.read(size):
                if number == 0:
                    out.write(data)
    out.flush()
    os.fsync(out.fileno())
print(json.dumps([time.perf_counter() - start, 0]))
"""


def checkpoints(options: Options) -> Iterator[Line]:
    """(h) `average_checkpoints` against a plain copy, and the memory that it takes."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = pathlib.Path(name)
        paths = [_write(folder, i, options.checkpoint_bytes) for i in range(_COUNT)]
        seconds: dict[str, list[float]] = {_AVERAGE: [], _COPY: []}
        peak = 0
        for number in range(options.rounds + 1):
            for script in seconds:
                took, memory = _run(script, folder, paths)
                peak = max(peak, memory)
                if number:  # the first reads from the disk
                    seconds[script].append(took)
    size = options.checkpoint_bytes / 1e9
    yield compare(
        "h",
        f"time of average_checkpoints, {_COUNT} of {size:g} GB, over a plain copy",
        (seconds[_AVERAGE], seconds[_COPY]),
        "at most 1.5",
        f"peak of memory, Python and JAX included: {peak / 1e6:.0f} MB",
    )


def _write(folder: pathlib.Path, seed: int, size: int) -> pathlib.Path:
    """A model whose largest tensor is a quarter of it, the rest in sixteenths."""
    rng = np.random.default_rng(seed)
    part = rng.standard_normal(size // 64, np.float32)
    tensors = {f"layer.{i}": part + i for i in range(12)}
    tensors["embedding"] = np.concatenate([part] * 4).reshape(4, -1)
    path = folder / f"{seed}.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def _run(
    script: str, folder: pathlib.Path, paths: list[pathlib.Path]
) -> tuple[float, int]:
    command = [sys.executable, "-c", script, str(folder), *map(str, paths)]
    took, memory = json.loads(subprocess.check_output(command))
    for name in ("out", "small"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    return took, memory
