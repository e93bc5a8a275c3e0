"""The transformations under test, and the training that tests put them through.

A new average becomes one line of ``METHODS``: it then has to pass every test that is
parametrised by ``every_method`` or ``every_case``. Those tests know of an average only
what is written here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

from ..compiled import programs

U = 2.0**-24  # float32's half ulp


def accumulate(state, params, sample=None):
    """``averaged_with`` with its condition in third place."""
    return swa_jax.averaged_with(state, params, sample=sample)


def loop(average, models):
    """The state of an average after these models, one an epoch."""
    state = swa_jax.init_average(models[0], average)
    for each in models:
        state = swa_jax.update_average(state, each, average)
    return state


def half_ulp(dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def bits(tree) -> list[bytes]:
    """The exact content of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def structure(tree) -> Any:
    """``jax.tree.structure``, whose result mypy has no class for."""
    return jax.tree.structure(tree)


def types(tree) -> list:
    """Everything about a tree that would make jit compile anew."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef, *map(jax.typeof, leaves)]


def shapes(tree) -> list:
    """Of arrays or of ``ShapeDtypeStruct``s."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef, *((leaf.shape, leaf.dtype) for leaf in leaves)]


def counters(state) -> tuple:
    """The updates seen and the models averaged, of the state of any average."""
    return state.num_updates, state.num_averaged


def trees(state) -> tuple:
    """All else that it keeps: trees like the parameters, perhaps with an axis more."""
    if isinstance(state, swa_jax.CompensatedSWAState):
        return state.average.avg_params, state.compensation
    return state[2:]


def fields(state) -> dict[str, Any]:
    """By name, the counters first."""
    if isinstance(state, swa_jax.CompensatedSWAState):
        return state.average._asdict() | {"compensation": state.compensation}
    return state._asdict()


# What is tested.


@dataclasses.dataclass(frozen=True)
class Method:
    """A transformation that averages, all of whose state but two counters is weights.

    Attributes:
      make: its factory.
      weights: what each of n sampled models counts for in the average, the oldest
        first: from n to n numbers that sum to 1. The oracle of every test.
      arguments: keyword arguments that the factory needs besides swa()'s.
      state: the type of its state.
      find: from an optimizer state to its state.
      read: from an optimizer state and the parameters to the average.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    weights: Callable[[int], np.ndarray]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: type = swa_jax.SWAState
    find: Callable[[Any], Any] = swa_jax.swa_state
    read: Callable[[Any, Any], Any] = swa_jax.swa_params


def running(rate: Callable[[int], float]) -> Callable[[int], np.ndarray]:
    """The weights of a running average, mean += rate(n) * (q - mean), in float64."""

    def weights(n: int) -> np.ndarray:
        rates = np.array([1.0, *map(rate, range(2, n + 1))])
        kept = np.append(np.cumprod((1 - rates[1:])[::-1])[::-1], 1.0)
        return rates * kept

    return weights


def latest(window: int) -> Callable[[int], np.ndarray]:
    """The weights of a mean of the latest models."""
    return lambda n: np.where(np.arange(n) >= n - window, 1 / min(n, window), 0.0)


def of(make: Callable[..., Any], weights: Any, state: type, **arguments: Any) -> Method:
    """A method whose average is found by the type of its state."""
    return Method(
        make,
        weights,
        arguments,
        state,
        lambda opt_state: swa_jax.average_state(opt_state, state),
        lambda opt_state, params: swa_jax.averaged_params(opt_state, params, state),
    )


def equal(n: int) -> np.ndarray:
    """All alike."""
    return np.full(n, 1 / n)


METHODS = {
    "swa": Method(swa_jax.swa, equal),
    "compensated": of(
        swa_jax.swa, equal, swa_jax.CompensatedSWAState, compensated=True
    ),
    "ema": of(
        swa_jax.ema,
        running(lambda n: 0.3 / (1 - 0.7**n)),
        swa_jax.EMAState,
        decay=0.7,
    ),
    "ema_warmup": of(
        swa_jax.ema,
        running(lambda n: max(0.1, n**-0.75)),
        swa_jax.EMAState,
        decay=swa_jax.ema_warmup(0.9, power=0.75),
    ),
    "power_ema": of(
        swa_jax.power_ema,
        running(lambda n: 1 - (1 - 1 / n) ** 3.5),
        swa_jax.PowerEMAState,
        gamma=2.5,
    ),
    "lawa": of(swa_jax.lawa, latest(2), swa_jax.LAWAState, window=2),
    "swag": of(swa_jax.swag, equal, swa_jax.SWAGState, rank=3),
}

#: Those that all transformations take.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "period": {"start_step": 3, "period": 2},
    "stop_step": {"start_step": 2, "stop_step": 4},
    "bfloat16": {"start_step": 2, "accumulator_dtype": jnp.bfloat16},
    "skip_nonfinite": {"start_step": 2, "skip_nonfinite": True},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method in one set of options."""

    method: Method
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self) -> optax.GradientTransformationExtraArgs:
        return self.method.make(**self.method.arguments, **self.options)

    def inject(self) -> optax.GradientTransformationExtraArgs:
        """The same, with its steps as arrays in ``optax.inject_hyperparams``."""
        static = {*self.method.arguments, *self.options} - {
            "start_step",
            "period",
            "stop_step",
        }
        factory = optax.inject_hyperparams(self.method.make, static_args=static)
        return factory(**self.method.arguments, **self.options)

    def state(self, opt_state) -> Any:
        return self.method.find(opt_state)

    def read(self, opt_state, params) -> Any:
        return self.method.read(opt_state, params)

    def sampled(self, steps: int) -> list[int]:
        """The numbers of the updates that are averaged, of so many."""
        start = self.options.get("start_step", 0)
        stop = self.options.get("stop_step", steps)
        return [
            t
            for t in range(max(start, 1), min(stop, steps) + 1)
            if (t - start) % self.options.get("period", 1) == 0
        ]

    def expected(self, history: list) -> Any:
        """The average of a run, in float64; its weights after every step are given."""
        models = [history[t - 1] for t in self.sampled(len(history))]
        return jax.tree.map(lambda *leaf: self._combine(leaf), *models)

    def _combine(self, models: tuple) -> np.ndarray:
        """Of one leaf; what is no floating number keeps the value of the last model."""
        if not jnp.issubdtype(models[0].dtype, jnp.inexact):
            return models[-1]
        exact = np.complex128 if jnp.iscomplexobj(models[0]) else np.float64
        stacked = np.stack([np.asarray(model, exact) for model in models])
        return np.tensordot(self.method.weights(len(models)), stacked, 1)

    def assert_average(self, average, history: list) -> None:
        """Compares with the float64 average of the stored weights.

        Reading rounds once more, to the parameter's dtype.
        """
        n = len(self.sampled(len(history)))

        def check(got, expected, *models):
            assert got.shape == expected.shape
            assert got.dtype == models[0].dtype
            if not jnp.issubdtype(got.dtype, jnp.inexact):
                np.testing.assert_array_equal(got, expected)
                return
            narrow = jnp.finfo(got.dtype).bits < 32  # some know no promotion
            wide = half_ulp(jnp.float32 if narrow else got.dtype)
            accumulator = self.options.get("accumulator_dtype")
            stored = half_ulp(accumulator) if accumulator else 0.0
            largest = max(float(np.max(np.abs(model), initial=0)) for model in models)
            exact = np.complex128 if jnp.iscomplexobj(got) else np.float64
            np.testing.assert_allclose(
                np.asarray(got, exact),
                expected,
                rtol=0,
                atol=largest * (self.error(n, wide, stored) + half_ulp(got.dtype)),
            )

        jax.tree.map(check, average, self.expected(history), *history)

    def error(self, n: int, wide: float = U, stored: float = 0.0) -> float:
        """The most by which the average of n models of size 1 may be off.

        The k-th moves the average by rate(k) * (q - mean), of size 2 at most. Sum and
        accumulator round by half an ulp of 1, the difference and the product by one of
        the step, and the rate is good to eight (its powers come from exp and log). From
        then on such an error is treated as the model is: it is left by as much as the
        average then counts for, the k-th model's weight over its rate.

        Args:
          n: models averaged.
          wide: half an ulp of what is computed in.
          stored: half an ulp of the accumulator, where it is narrower.
        """
        rates = np.array([self.method.weights(k)[-1] for k in range(1, n + 1)])
        left = self.method.weights(n) / rates
        return float(left @ (wide * (1 + 2 * 10 * rates) + stored))

    def assert_run(self, params, opt_state, history: list) -> None:
        """Checks the counters and the average of a run."""
        expected = (len(history), len(self.sampled(len(history))))
        assert tuple(map(int, counters(self.state(opt_state)))) == expected
        self.assert_average(jax.jit(self.read)(opt_state, params), history)


CASES = {
    f"{name}-{options}": Case(method, OPTIONS[options])
    for name, method in METHODS.items()
    for options in OPTIONS
}
#: One of each method, that has sampled and skipped steps.
ONE_CASE = {name: Case(method, OPTIONS["period"]) for name, method in METHODS.items()}


def every_case(test):
    """Runs a test for every method and every set of options."""
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())(test)


def every_method(test):
    """Runs a test for every method, averaging updates 3, 5, 7, ..."""
    values = ONE_CASE.values()
    return pytest.mark.parametrize("case", values, ids=ONE_CASE.keys())(test)


# Training.


def model() -> dict[str, Any]:
    """Fresh parameters of a small network."""
    rng = np.random.default_rng(0)
    return {
        "encoder": {
            "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
            "b": jnp.zeros(3),
        },
        "head": {"w": jnp.asarray(rng.normal(size=(3,)), jnp.float32)},
    }


def gradient(params, t):
    """Of a loss that changes with every batch."""

    def one(w):
        noise = jnp.sin(t + jnp.arange(w.size)).reshape(w.shape)
        return 0.5 * w + noise.astype(w.dtype)

    return jax.tree.map(one, params)


def make_step(tx, gradient=gradient):
    """A training step from (params, opt_state, *arguments of the gradient)."""

    def step(params, opt_state, *args):
        updates, opt_state = tx.update(gradient(params, *args), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def train(tx, params, steps: int = 8, **extra):
    """The states and the stored weights of every step, from one compiled step."""

    @jax.jit
    def step(params, opt_state, t):
        grads = gradient(params, t)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    history = []
    for t in range(steps):
        params, opt_state = step(params, opt_state, jnp.float32(t))
        history.append(jax.device_get(params))
    assert programs(step) == 1  # compiled once for all steps
    return params, opt_state, history
