"""Runs the worker once a target, whoever asks first, and keeps what it found."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from ..compiled import Report
from .worker import CPU, H100, TPU_2X2, TPU_2X4

ROOT = pathlib.Path(__file__).parents[2]
#: Distributions that hold a target's compiler.
_COMPILERS = {
    CPU: (),
    TPU_2X4: ("libtpu",),
    TPU_2X2: ("libtpu",),
    H100: ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"),
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may hold the compiler
    # libtpu asks a cloud's metadata server for these two, and complains elsewhere.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def missing_compilers(target: str) -> list[str]:
    """The distributions that a target needs and this environment lacks."""

    def installed(name: str) -> bool:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    return [name for name in _COMPILERS[target] if not installed(name)]


def report(folder: pathlib.Path, target: str, case: str, time_limit: float) -> Report:
    """What became of a case; compiles all of the target's if nobody has yet.

    Args:
      folder: keeps the results; may be shared by several processes.
      target: one of the worker's.
      case: one of the target's.
      time_limit: seconds for all of the target's cases together.

    Raises:
      RuntimeError: the case did not compile, or the worker ended before it.
    """
    stem = folder / target.replace(" ", "-").replace(":", "-")
    with _locked(stem.with_suffix(".lock")):
        ending = stem.with_suffix(".ending")
        if not ending.exists():
            ending.write_text(_run(stem, target, time_limit))
    for line in stem.with_suffix(".jsonl").read_text().splitlines():
        found: dict[str, Any] = json.loads(line)
        if found["case"] == case and "error" in found:
            raise RuntimeError(f"{target}: {case} does not compile\n{found['error']}")
        if found["case"] == case:
            return Report(**found["report"])
    raise RuntimeError(f"{target}: no report on {case}; {ending.read_text()}")


def _run(stem: pathlib.Path, target: str, time_limit: float) -> str:
    """Writes one line a case to a file; returns how the worker ended."""
    command = [sys.executable, "-m", "tests.aot.worker", target]
    errors = stem.with_suffix(".stderr")
    with stem.with_suffix(".jsonl").open("w") as out, errors.open("w") as err:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | _ENVIRONMENT,
                stdout=out,
                stderr=err,
                timeout=time_limit,
                check=False,
            ).returncode
            ending = f"the worker ended with status {code}"
        except subprocess.TimeoutExpired:
            ending = f"the worker was stopped after {time_limit} s"
    return f"{ending}; its last words: {errors.read_text()[-2000:]}"


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file
        yield
