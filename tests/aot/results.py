"""Compiles a target's cases, whoever asks first, and keeps what the worker found."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..compiled import Report
from .worker import CPU, H100, TARGETS, TPU_2X2, TPU_2X4

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
      RuntimeError: the case did not compile, or no worker came to it.
    """
    stem = folder / target.replace(" ", "-").replace(":", "-")
    with _locked(stem.with_suffix(".lock")):
        path = stem.with_suffix(".jsonl")
        if not path.exists():
            command = [sys.executable, "-m", "tests.aot.worker", target]
            found = compile_all(command, TARGETS[target].cases, stem, time_limit)
            path.write_text("".join(json.dumps(x) + "\n" for x in found.values()))
    for line in path.read_text().splitlines():
        result: dict[str, Any] = json.loads(line)
        if result["case"] == case and "error" in result:
            raise RuntimeError(f"{target}: {case}: {result['error']}")
        if result["case"] == case:
            return Report(**result["report"])
    raise RuntimeError(f"{target} has no case {case}")


def compile_all(
    command: Sequence[str], cases: Iterable[str], stem: pathlib.Path, time_limit: float
) -> dict[str, dict[str, Any]]:
    """What a worker writes about each case, or in its place why there is nothing.

    A worker that ends in the middle of a case, as a compiler can make it, loses this
    case only: the next worker goes on with the rest.

    Args:
      command: of the worker; the cases that it is to compile are appended.
      cases: their names.
      stem: of the files that take the worker's output.
      time_limit: seconds for all cases together.
    """
    deadline = time.monotonic() + time_limit
    found: dict[str, dict[str, Any]] = {}
    left = list(cases)

    def fail(case: str, error: str) -> None:
        found[case] = {"case": case, "error": error}
        left.remove(case)

    while left:
        lines, ending = _run([*command, *left], stem, deadline - time.monotonic())
        for line in lines:
            if line["case"] in left and len(line) > 1:
                found[line["case"]] = line
                left.remove(line["case"])
        begun = lines[-1]["case"] if lines else None
        if begun in left:
            fail(begun, f"was being compiled when {ending}")
            if time.monotonic() < deadline:
                continue
        for case in list(left):  # there is no time, or no worker that begins with it
            fail(case, f"not begun when {ending}")
    return found


def _run(
    command: Sequence[str], stem: pathlib.Path, time_limit: float
) -> tuple[list[dict[str, Any]], str]:
    """The lines that one worker wrote, and how it ended."""
    output, errors = stem.with_suffix(".stdout"), stem.with_suffix(".stderr")
    with output.open("w") as out, errors.open("w") as err:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | _ENVIRONMENT,
                stdout=out,
                stderr=err,
                timeout=max(time_limit, 0),
                check=False,
            ).returncode
            ending = f"the worker ended with status {code}"
        except subprocess.TimeoutExpired:
            ending = f"the worker was stopped after {time_limit:.0f} s"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return lines, f"{ending}; its last words: {errors.read_text()[-2000:]}"


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file
        yield
