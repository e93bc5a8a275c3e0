"""How exact a float32 mean of many models is.

`python -m experiments.benchmark.precision`, a minute.

Weights near 1 that drift by 1 % under noise of 0.1 %, and the largest relative error of
64 of them against a float64 mean, with and without `compensated=True`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import swa_jax

NUMBERS = (10**2, 10**3, 10**4, 10**5, 10**6)
_WEIGHTS, _CHUNK = 64, 10**5


def errors(number: int) -> tuple[float, float]:
    """Relative errors of the plain and the compensated mean of `number` models."""
    rng, total = np.random.default_rng(0), np.zeros(_WEIGHTS)
    start = jnp.ones(_WEIGHTS)
    states = [swa_jax.init_average(start, compensated=c) for c in (False, True)]
    for first in range(0, number, _CHUNK):
        steps = np.arange(first, min(number, first + _CHUNK))[:, None]
        noise = rng.normal(size=(len(steps), _WEIGHTS))
        models = np.float32(1 + 0.01 * steps / number + 0.001 * noise)
        total += models.sum(0, dtype=np.float64)
        states = _average(states, models)
    means = (np.asarray(state.avg_params, np.float64) for state in states)
    plain, compensated = (np.abs(x / (total / number) - 1).max() for x in means)
    return float(plain), float(compensated)


@jax.jit
def _average(states: Sequence[swa_jax.SWAState], models: jax.Array) -> list:
    def step(states: list, model: jax.Array) -> tuple[list, None]:
        return [swa_jax.averaged_with(state, model) for state in states], None

    return jax.lax.scan(step, list(states), models)[0]


def row(number: int) -> str:
    """A line of the table in docs/benchmark.md."""
    plain, compensated = errors(number)
    return f"| {number:,} | {plain:.1e} | {compensated:.1e} |"


if __name__ == "__main__":
    print("| Models | plain | compensated |\n|---:|---:|---:|")
    for count in NUMBERS:
        print(row(count), flush=True)
