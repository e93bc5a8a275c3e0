"""(b) and (p): `update_average` against a plain loop."""

import ctypes
import functools
import pathlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import swa_jax
from experiments.benchmark import trees
from experiments.benchmark.measuring import (
    Action,
    Line,
    Options,
    PyTree,
    compare,
    in_milliseconds,
    take_turns,
)


class Averaging:
    """`update_average` on a tree, called again and again; of `swa` by default.

    With `jitted` inside a `jax.jit`, so that no Python of it runs.
    """

    def __init__(
        self, params: PyTree, average: Any = None, *, jitted: bool = False
    ) -> None:
        self.params = params
        self.average = average
        self.state = swa_jax.init_average(params, average)
        self.update = swa_jax.update_average
        if jitted:
            self.update = jax.jit(
                swa_jax.update_average, donate_argnums=0, static_argnums=2
            )

    def run(self) -> None:
        """One average, waited for."""
        self.state = self.update(self.state, self.params, self.average)
        jax.block_until_ready(self.state)


_TRIAD = r"""
#include <stddef.h>
void average(float *restrict mean, const float *restrict new, float weight, size_t n) {
    #pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) mean[i] += (new[i] - mean[i]) * weight;
}
"""


def c_average(size: int) -> Action | None:
    """The same arithmetic over one array of `size` floats, in C.

    None without a C compiler that knows OpenMP.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "average.c")
        source.write_text(_TRIAD)
        library = source.with_suffix(".so")
        # No -ffast-math: a library linked with it sets subnormals to zero in whoever
        # loads it, for good.
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        command = [compiler, *flags, "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            function = ctypes.CDLL(str(library)).average
        except (subprocess.CalledProcessError, OSError):
            return None  # no OpenMP, or its library is missing
    floats = np.ctypeslib.ndpointer(np.float32, flags="C")
    function.argtypes = [floats, floats, ctypes.c_float, ctypes.c_size_t]
    function.restype = None
    mean, new = np.zeros(size, np.float32), np.ones(size, np.float32)
    return lambda: function(mean, new, 0.5, size)


def plain_loop(size: int) -> tuple[Action, str]:
    """The fastest average of one array that is at hand, and what it is."""
    in_c = c_average(size)
    if in_c is not None:
        return in_c, "C, OpenMP"
    mean, new = np.zeros(size, np.float32), np.ones(size, np.float32)
    return lambda: np.add(mean, new, out=mean), "NumPy"


def bandwidth(options: Options) -> Iterator[Line]:
    """(b) Bytes a second of `update_average` against a plain loop."""
    params = trees.resnet50_params()
    size = sum(x.size for x in jax.tree.leaves(params))
    reference, name = plain_loop(size)
    ours = Averaging(params)
    seconds = take_turns({"ours": ours.run, "c": reference}, 3 * options.rounds)
    # Both read the mean and the weights and write the mean: 12 bytes a value. A ratio
    # of bandwidths is the inverse one of times.
    speed = 12e-9 * size / statistics.median(seconds["ours"])
    pair = seconds["c"], seconds["ours"]
    what = f"bandwidth of update_average over {name}"
    yield compare("b", what, pair, "at least 0.9", f"{speed:.1f} GB/s")


def profile(options: Options) -> Iterator[Line]:
    """(p) What stands between `update_average` and a plain loop, thing by thing."""
    params = trees.resnet50_params()
    size = sum(x.size for x in jax.tree.leaves(params))
    reference, name = plain_loop(size)
    stages: dict[str, Bare | Averaging] = {
        "m + (q - m) * 0.5 on one array": Bare(jnp.ones(size)),
        "m + (q - m) * 0.5 on all arrays": Bare(params),
        "update_average's formula": Averaging(params, jitted=True),
        "update_average": Averaging(params),
    }
    actions = {what: stage.run for what, stage in stages.items()}
    seconds = take_turns({**actions, name: reference}, 3 * options.rounds)
    for what in stages:
        pair = seconds[name], seconds[what]
        yield compare("p", f"bandwidth of {what} over {name}", pair, "")
    tiny = jax.tree.map(lambda x: jnp.ones((1,)), params)
    calls = {"update_average": Averaging(tiny), "JAX": Averaging(tiny, jitted=True)}
    seconds = take_turns({k: x.run for k, x in calls.items()}, 10 * options.rounds)
    count = len(jax.tree.leaves(tiny))
    for what, times in seconds.items():
        yield in_milliseconds("p", f"a call on {count} tiny arrays, {what}", times, "")


class Bare:
    """Halfway to the parameters, again and again: no counter, no check."""

    def __init__(self, params: PyTree) -> None:
        self.params = params
        self.mean = jax.tree.map(jnp.zeros_like, params)

    def run(self) -> None:
        """One average, waited for."""
        self.mean = _halfway(self.mean, self.params)
        jax.block_until_ready(self.mean)


@functools.partial(jax.jit, donate_argnums=0)
def _halfway(mean: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(lambda m, q: m + (q - m) * 0.5, mean, params)
