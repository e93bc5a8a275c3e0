"""Averages that are one and the same under two names, and what they are in closed form.

Oracles are means, recursions and variances of NumPy in float64.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import swa_jax

from .transformations import U

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)


def average_of(models, average, *, read="avg_params"):
    """Of the leading axis, one compiled loop; and the state."""

    def step(state, model):
        return swa_jax.averaged_with(state, model, average), None

    @jax.jit
    def run(models):
        state = swa_jax.init_average(jax.tree.map(lambda x: x[0], models), average)
        return jax.lax.scan(step, state, models)[0]

    state = run(models)
    return np.asarray(state.avg_params), state


def noisy(n: int, center: float = 1.0, spread: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.normal(center, spread, size=(n, 32))


EQUAL_MEANS = {
    "power_ema": lambda: swa_jax.power_ema(gamma=0),
    "widest sigma": lambda: swa_jax.power_ema(12**-0.5),
    # n is an int32, of which JAX makes a float32 also where 64 bits are on.
    "function": lambda: swa_jax.ema(lambda n: 1 - 1 / n.astype(float)),
    "ema_warmup": lambda: swa_jax.ema(swa_jax.ema_warmup(1, power=1)),
    "without debias": lambda: swa_jax.ema(swa_jax.ema_warmup(1, power=1), debias=False),
    "lawa": lambda: swa_jax.lawa(300),
    "swag": lambda: swa_jax.swag(2),
    "compensated": lambda: swa_jax.swa(compensated=True),
}


@pytest.mark.parametrize("name", EQUAL_MEANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.usefixtures("enable_x64")
def test_equal_means(name, dtype):
    models = noisy(300).astype(dtype)
    expected = models.astype(np.float64).mean(0)
    for average in (swa_jax.swa(), EQUAL_MEANS[name]()):
        found, state = average_of(models, average)
        assert int(state.num_averaged) == 300
        # At worst n / 2 half ulps of the largest, as in test_averaging; and a rate is
        # good to eight of them, of a step that is 1 / n of the spread.
        half_ulp = 2.0**-53 if dtype == "float64" else U
        bound = half_ulp * np.abs(models.astype(np.float64)).max() * (300 / 2 + 20)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 4, 5, 11])
def test_a_window_is_the_mean_of_the_latest(n, dtype):
    models = noisy(n, 300).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    found, state = average_of(models, swa_jax.lawa(4))
    expected = models[-4:].astype(np.float64).mean(0)
    assert jax.tree.leaves(state.window)[0].dtype == dtype
    # Around one of the models: three differences of 1, their sum, one sum near 300.
    np.testing.assert_allclose(found, expected, rtol=0, atol=U * (300 + 20))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.usefixtures("enable_x64")
def test_debiased_average_is_adams_first_moment(decay, n):
    models = noisy(n)
    found, _ = average_of(models, swa_jax.ema(decay))
    moment = np.zeros(32)
    for model in models:
        moment = decay * moment + (1 - decay) * model
    # Of float64; Adam's own numerator and denominator lose the digits of 1 - decay.
    np.testing.assert_allclose(
        found, moment / (1 - decay**n), rtol=2.0**-52 * n / (1 - decay)
    )


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.99999])
def test_float32_keeps_the_digits_of_one_minus_decay(decay):
    # 1 - float32(0.99999) is off by 1.3e-3: 50 times the bound.
    models = noisy(200).astype(np.float32)
    found, _ = average_of(models, swa_jax.ema(decay))
    moment = np.zeros(32)
    for model in models.astype(np.float64):
        moment = decay * moment + (1 - decay) * model
    expected = moment / -np.expm1(200 * np.log(decay))
    np.testing.assert_allclose(found, expected, rtol=U * (200 + 20))


def test_plain_average_keeps_its_first_model():
    models = noisy(100).astype(np.float32)
    found, _ = average_of(models, swa_jax.ema(0.9, debias=False))
    expected = models[0].astype(np.float64)
    for model in models[1:].astype(np.float64):
        expected += (1 - 0.9) * (model - expected)
    # Errors are forgotten by the tenth: ten half ulps, and two for each step of 0.1.
    np.testing.assert_allclose(found, expected, rtol=U * 1.4 * (10 + 2))


# SWAG's variance.


@pytest.mark.parametrize("n", [2, 30, 500])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.usefixtures("enable_x64")
def test_variance_of_weights_far_from_zero(n, dtype):
    # mean(q**2) - mean(q)**2 would lose 300**2 / .01**2 = 9e8 of float32's 1.7e7.
    models = noisy(n, 300, 0.01).astype(dtype)
    _, state = average_of(models, swa_jax.swag(3))
    variance = np.asarray(state.sq_deviations, np.float64) / n
    assert (variance > 0).all()
    exact = models.astype(np.float64)
    # A deviation of .01 is off by as much as the mean: half an ulp of 300, 1.5e-5, from
    # being stored, and so for each step before, as often up as down.
    half_ulp = {"float32": U, "float64": 2.0**-53}[dtype]
    error = half_ulp * 300 * np.sqrt(n + 20)
    np.testing.assert_allclose(
        variance, exact.var(0), rtol=2 * error / exact.std(0).min() + 1e-13
    )
    # The latest rows, each less the mean as it left it.
    for k in range(n - min(n, 3), n):
        off = exact[k] - exact[: k + 1].mean(0)
        found = state.deviations[k % 3]
        np.testing.assert_allclose(found, off, rtol=0, atol=error + 1e-15)


def test_squares_are_never_negative():
    # Of weights that hardly move, where a difference of sums would be noise about 0.
    models = (300 + np.float32(2.0**-15) * np.arange(64)[:, None] % 3).astype("float32")
    _, state = average_of(models, swa_jax.swag(2))
    assert (np.asarray(state.sq_deviations) >= 0).all()
    still = np.full((64, 5), 300.1, np.float32)
    _, state = average_of(still, swa_jax.swag(2))
    assert not np.asarray(state.sq_deviations).any()
    assert not np.asarray(state.deviations).any()


def test_complex_weights_are_two_each():
    parts = [noisy(50).astype(np.float32), noisy(49 + 1)[::-1].astype(np.float32)]
    _, both = average_of(
        (parts[0] + 1j * parts[1]).astype("complex64"), swa_jax.swag(2)
    )
    for part, of in zip(parts, (np.real, np.imag), strict=True):
        _, alone = average_of(part, swa_jax.swag(2))
        for one, other in zip(both[2:], alone[2:], strict=True):
            # Complex division rounds a few times more.
            np.testing.assert_allclose(of(one), other, rtol=0, atol=60 * 4 * U)


# Weights of 16 bits.


def test_bfloat16_weights_are_followed():
    # From 1 to 2 at once: after 1,000 models at decay .999 the average has gone
    # 1 - .999**1000 = 63 % of the way.
    models = np.full((1001, 4), 2, ml_dtypes.bfloat16)
    models[0] = 1
    average = swa_jax.ema(0.999, debias=False)
    found, _ = average_of(models, average)
    expected = 2 - 0.999**1000
    np.testing.assert_allclose(found, np.full(4, expected), rtol=U * 1000)
    # A peer, which keeps it in the weights' dtype, stands still for ever.
    theirs = jnp.asarray(models[0])
    for model in models[1:]:
        theirs = optax.incremental_update(jnp.asarray(model), theirs, 0.001)
    np.testing.assert_array_equal(np.asarray(theirs, np.float32), np.ones(4))
