"""What an average is made of: weights of models, windows, distances."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swa_jax

from .transformations import METHODS, U, every_method, model, train

COUNTS = [1, 2, 3, 10, 1000]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", METHODS)
def test_weights_are_the_oracles(name, n):
    method = METHODS[name]
    found = swa_jax.averaging_weights(method.make(**method.arguments), n)
    assert (found.dtype, found.shape) == (np.dtype(np.float64), (n,))
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(found, method.weights(n), atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_what_the_average_does(name):
    # The average of unit vectors; float32's rates are within a few roundings.
    method = METHODS[name]
    average = method.make(**method.arguments)
    state = swa_jax.init_average(jnp.zeros(9), average)
    for unit in np.eye(9, dtype=np.float32):
        state = swa_jax.update_average(state, unit, average)
    expected = swa_jax.averaging_weights(average, 9)
    np.testing.assert_allclose(state.avg_params, expected, atol=20 * U)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "arrays": lambda n: jnp.minimum(0.9, n / (9 + n)),
    "constant": lambda n: 0.5,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_of_a_function_of_ones_own(name):
    decay = FUNCTIONS[name]
    found = swa_jax.averaging_weights(swa_jax.ema(decay), 30)
    rates = [1.0, *(1 - float(decay(np.int32(n))) for n in range(2, 31))]
    expected = [r * np.prod(1 - np.array(rates[i + 1 :])) for i, r in enumerate(rates)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 decays


@pytest.mark.parametrize(
    ("average", "n", "expected"),
    [
        (swa_jax.swa(), 100, 100),
        (swa_jax.swa(compensated=True), 100, 100),
        (swa_jax.swag(5), 100, 100),
        (swa_jax.lawa(8), 100, 8),
        (swa_jax.lawa(8), 5, 5),
        (swa_jax.ema(0.99), 10**5, 1.99 / 0.01),
        (swa_jax.ema(0.0), 50, 1),
        # (gamma + 1)^2 / (2 gamma + 1) is that of the profile, by integration.
        (swa_jax.power_ema(gamma=3), 10**6, 10**6 * 7 / 16),
        (swa_jax.power_ema(gamma=0), 1000, 1000),
    ],
    ids=lambda x: "" if isinstance(x, tuple) else str(x),
)
def test_effective_window(average, n, expected):
    np.testing.assert_allclose(swa_jax.effective_window(average, n), expected, 2e-5)


@every_method
def test_models_and_distance_in_training(case):
    tx = optax.chain(optax.sgd(0.1), case.make())
    params, opt_state, history = train(tx, model())
    which = case.method.state
    n = len(case.sampled(len(history)))
    kept = int(np.count_nonzero(case.method.weights(n)))
    for f in (
        swa_jax.models_in_average,
        lambda s, w: jax.jit(lambda s: swa_jax.models_in_average(s, w))(s),
    ):
        assert int(f(opt_state, which)) == kept
    average = case.read(opt_state, params)
    square = jax.tree.map(
        lambda a, b: np.sum((np.asarray(a, np.float64) - np.asarray(b)) ** 2),
        average,
        params,
    )
    expected = np.sqrt(sum(jax.tree.leaves(square)))
    distance = swa_jax.average_distance
    np.testing.assert_allclose(distance(opt_state, params, which), expected, rtol=1e-6)
    jitted = jax.jit(lambda s, p: distance(s, p, which))(opt_state, params)
    np.testing.assert_allclose(jitted, expected, rtol=1e-6)
    assert distance(tx.init(params), params, which) == 0  # and says nothing


def test_distance_over_every_kind_of_leaf():
    def tree(x):
        return {
            "bf16": jnp.full(1, x, jnp.bfloat16),
            "complex": jnp.full(1, 3j * x, jnp.complex64),
            "int": jnp.int32(x),
            "key": jax.random.key(int(x)),
            "none": None,
        }

    state = swa_jax.update_average(swa_jax.init_average(tree(1)), tree(1))
    np.testing.assert_allclose(
        swa_jax.average_distance(state, tree(3)), np.sqrt(4 + 36), rtol=4 * U
    )


def test_of_replicas():
    average = swa_jax.lawa(2)
    params = jnp.ones((8, 3))
    state = jax.pmap(lambda p: swa_jax.init_average(p, average))(params)
    for _ in range(3):
        step = lambda s, p: swa_jax.averaged_with(s, p, average)  # noqa: E731
        state = jax.pmap(step)(state, params)
    np.testing.assert_array_equal(swa_jax.models_in_average(state), [2] * 8)


def test_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0; it is a numb"):
        swa_jax.averaging_weights(swa_jax.swa(), 0)
    with pytest.raises(TypeError, match="averaging_weights: average must be one of sw"):
        swa_jax.averaging_weights(optax.sgd(0.1), 3)
