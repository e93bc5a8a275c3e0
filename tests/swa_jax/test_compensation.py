"""The compensated mean: right to the last place for any number of models, in place.

Oracles are float64 means of the very models that were averaged: of NumPy where they fit
in memory, else from exact sums of integers (``drifting``). Errors are counted in units
in the last place (ulps) of the dtype of the mean, at 1.
"""

import functools
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swa_jax

from ..compiled import assert_in_place, programs
from .test_averaging import bits, types, weights
from .transformations import accumulate, structure

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

compensated_average = functools.partial(swa_jax.init_average, compensated=True)

#: Half for the rounding of the mean, and half, at most, because the step leaves ``low``
#: out. (For a mean that fell below 1 the first is a whole, of a place half as large.)
ULPS = 1.0


def ulps(mean: Any, expected: np.ndarray, scale: float = 1.0) -> float:
    """The largest error, in last places of the mean's dtype at ``scale``."""
    difference = np.asarray(mean).astype(expected.dtype) - expected
    return float(np.abs(difference).max() / (scale * float(jnp.finfo(mean.dtype).eps)))


def average_of(models: np.ndarray, **options: Any) -> swa_jax.CompensatedSWAState:
    """The average of the leading axis, one compiled loop."""
    state = compensated_average(jnp.asarray(models[0]), **options)
    step = lambda state, model: (accumulate(state, model), None)  # noqa: E731
    run = jax.jit(lambda state, models: jax.lax.scan(step, state, models)[0])
    return run(state, jnp.asarray(models))


# The mean.


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("accumulator", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("n", [2, 7, 1000])
def test_mean_is_right_to_the_last_place(dtype, accumulator, n):
    models = (1 + 0.1 * weights(n, 64)).astype(dtype)
    state = average_of(models, accumulator_dtype=accumulator)
    assert state.avg_params.dtype == (accumulator or jnp.float32)
    assert state.compensation.dtype == jnp.float32
    assert ulps(state.avg_params, models.astype(np.float64).mean(0)) <= ULPS


def test_complex_mean():
    models = weights(1000, 64) + 1j * (2 + weights(1000, 64, seed=1))
    state = average_of(models.astype(np.complex64))
    expected = models.astype(np.complex64).astype(np.complex128).mean(0)
    for part in (np.real, np.imag):
        error = np.abs(part(np.asarray(state.avg_params)) - part(expected)).max()
        assert error <= ULPS * 2 * 2.0**-23  # numbers up to 4


@pytest.mark.usefixtures("enable_x64")
def test_float64_mean():
    # Multiples of 2^-20 sum exactly in NumPy's float64.
    models = np.round(weights(1000, 64).astype(np.float64) * 2**20) / 2**20
    state = average_of(models)
    assert state.avg_params.dtype == state.compensation.dtype == jnp.float64
    assert ulps(state.avg_params, models.mean(0)) <= ULPS


def drifting(n: int, center: float, width: int = 64):
    """Makes model ``i`` of ``n``, in NumPy and in JAX: as integers, times 2^24.

    Like the weights of a long training: 1 % of drift, 0.1 % of noise.
    """

    def model(xp: Any, i: Any) -> Any:
        noise = i.astype(xp.uint32) * np.uint32(2654435761)
        noise = noise + xp.arange(width, dtype=xp.uint32) * np.uint32(40503)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            noise = (noise ^ (noise >> np.uint32(shift))) * np.uint32(factor)
        noise = (noise >> np.uint32(18)).astype(xp.int32) - 2**13
        return round(center * 2**24) + i.astype(xp.int32) // max(1, n // 2**17) + noise

    return model


def mean_of_drifting(n: int, center: float, **options: Any) -> tuple[Any, np.ndarray]:
    """The average of ``n`` models, and the exact mean."""
    model = drifting(n, center)

    @jax.jit
    def run(state):
        def step(state, i):
            new = model(jnp, i[None]).astype(jnp.float32) * 2.0**-24
            return accumulate(state, new), None

        return jax.lax.scan(step, state, jnp.arange(n))[0]

    total = np.zeros(64, np.int64)
    for start in range(0, n, 10_000):
        i = np.arange(start, min(start + 10_000, n))[:, None]
        total += model(np, i).sum(0)
    state = run(swa_jax.init_average(jnp.zeros(64), **options))
    return state, total / n / 2.0**24


@pytest.mark.parametrize("center", [0.75, 1.0])
def test_mean_of_100_000_models_that_drift(center):
    # At 1 the mean rises through a power of two, from there on to 1.005.
    state, expected = mean_of_drifting(100_000, center, compensated=True)
    assert ulps(state.avg_params, expected) <= ULPS
    plain, _ = mean_of_drifting(100_000, center)
    assert ulps(plain.avg_params, expected) > 30  # why it exists


def test_mean_that_falls_through_a_power_of_two():
    # Where the spacing halves, and `low` is suddenly wide: without its flag the mean
    # comes out some 20 ulps off. It hovers at 1, so that this happens again and again.
    models = (1 + 0.1 * weights(20_000, 64)).astype(np.float32)
    state = average_of(models)
    assert ulps(state.avg_params, models.astype(np.float64).mean(0)) <= ULPS


@pytest.mark.parametrize("scale", [1e-22, 3e-6, 1e30])
@pytest.mark.parametrize("accumulator", [None, jnp.float16])
def test_scales(scale, accumulator):
    if accumulator and scale != 3e-6:
        pytest.skip("beyond float16")
    models = (scale * (1 + 0.5 * weights(500, 64))).astype(np.float32)
    state = average_of(models, accumulator_dtype=accumulator)
    error = np.asarray(state.avg_params, np.float64) - models.astype(np.float64).mean(0)
    # Of float16 all these numbers are subnormal, at a spacing of 2^-24.
    place = 2.0**-24 if accumulator else scale * 2.0**-23
    assert np.abs(error).max() <= ULPS * place


def test_compensation_is_what_the_mean_lacks():
    models = (1 + 0.1 * weights(1000, 64)).astype(np.float32)
    state = average_of(models)
    both = np.asarray(state.avg_params, np.float64) + np.asarray(state.compensation)
    # The step leaves `low` out: the result is off by the mean of it over all steps.
    error = np.abs(both - models.astype(np.float64).mean(0)).max()
    assert error < 0.25 * 2.0**-23


@pytest.mark.parametrize("start", [3e38, np.nan, np.inf])
def test_first_model_replaces_whatever_the_state_was_created_from(start):
    state = compensated_average(np.full(3, start, np.float32))
    model = np.array([0.1, -0.0, 3e38], np.float32)
    state = swa_jax.update_average(state, model)
    assert bits(state.avg_params) == bits(model)
    state = swa_jax.update_average(state, model)
    np.testing.assert_array_equal(state.avg_params, model)


def test_skipped_step_keeps_every_bit():
    odd = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    average = swa_jax.SWAState(jnp.int32(7), jnp.int32(4), {"w": odd.view(np.float32)})
    state = swa_jax.CompensatedSWAState(average, {"w": odd[::-1].view(np.float32)})
    new = jax.jit(accumulate)(state, {"w": jnp.full(4, jnp.nan)}, jnp.array(False))
    assert int(new.num_updates) == 8
    assert bits(new)[1:] == bits(state)[1:]


def test_differentiable_as_the_plain_mean():
    # d mean / d q = 1 / (n + 1) and d mean / d old = n / (n + 1), exact for n = 3.
    def mean(old, new):
        average = swa_jax.SWAState(jnp.int32(3), jnp.int32(3), old)
        state = swa_jax.CompensatedSWAState(average, jnp.zeros_like(old))
        return accumulate(state, new, jnp.array(True)).avg_params.sum()

    for grad in (jax.grad(mean, argnums=(0, 1)), jax.jit(jax.grad(mean, (0, 1)))):
        found = grad(jnp.ones(2), jnp.zeros(2))
        np.testing.assert_array_equal(found, [[0.75, 0.75], [0.25, 0.25]])


# Trees and states.


def tree(value: float) -> dict[str, Any]:
    """A leaf of every kind."""
    return {
        "w": jnp.full((2, 3), value, jnp.float32),
        "h": jnp.full(3, value, jnp.bfloat16),
        "c": jnp.full(2, value * (1 + 1j), jnp.complex64),
        "i": jnp.arange(3) * int(value),
        "key": jax.random.key(int(value)),
        "none": None,
        "hidden": optax.MaskedNode(),
    }


def test_leaves_of_every_kind():
    state = compensated_average(tree(7))
    expected_types = types(state)
    for value in (1, 2, 6):
        state = swa_jax.update_average(state, tree(value))
        assert types(state) == expected_types
    mean = {**tree(3), "i": jnp.arange(3) * 6, "key": jax.random.key(6)}
    chex.assert_trees_all_equal(swa_jax.swa_params(state, tree(1)), mean)
    assert state.compensation["i"] == optax.MaskedNode()
    assert state.compensation["none"] is None


def test_swa_with_compensation():
    tx = optax.chain(optax.sgd(1.0), swa_jax.swa(2, 2, compensated=True))
    params = {"w": jnp.zeros(3), "n": jnp.arange(2)}
    opt_state = tx.init(params)
    step = jax.jit(tx.update, donate_argnums=1)
    for t in range(1, 7):
        grads = {"w": jnp.full(3, -float(t)), "n": jnp.zeros(2, jnp.int32)}
        updates, opt_state = step(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert programs(step) == 1
    state = swa_jax.swa_state(opt_state)
    assert isinstance(state, swa_jax.SWAState)
    assert (int(state.num_updates), int(state.num_averaged)) == (6, 3)
    # Weights 3, 10 and 21.
    average = swa_jax.swa_params(opt_state, params)["w"]
    np.testing.assert_allclose(average, np.full(3, 34 / 3), rtol=2.0**-23)


def test_swa_skips_models_that_are_not_finite():
    tx = swa_jax.swa(compensated=True, skip_nonfinite=True)
    state = tx.init(jnp.zeros(2))
    for value in (1.0, np.nan, 3.0, np.inf):
        _, state = tx.update(jnp.full(2, value), state, jnp.zeros(2))
    assert int(state.num_averaged) == 2
    np.testing.assert_array_equal(state.avg_params, [2.0, 2.0])


def test_off_by_default_and_the_same_state_as_ever():
    params = {"w": jnp.ones(2)}
    for state in (swa_jax.init_average(params), swa_jax.swa().init(params)):
        assert type(state) is swa_jax.SWAState
        assert state._fields == ("num_updates", "num_averaged", "avg_params")


def test_going_on_with_and_without():
    # As the docstring of the state says.
    models = (1 + 0.1 * weights(100, 8)).astype(np.float32)
    average = swa_jax.init_average(models[0])
    for model in models[:50]:
        average = swa_jax.update_average(average, model)
    fresh = swa_jax.init_average(average.avg_params, compensated=True)
    state = fresh._replace(
        average=average,
        compensation=jax.tree.map(jnp.zeros_like, fresh.compensation),
    )
    for model in models[50:75]:
        state = swa_jax.update_average(state, model)
    average = state.average
    for model in models[75:]:
        average = swa_jax.update_average(average, model)
    assert int(average.num_averaged) == 100
    # 75 plain steps, at half an ulp each in the worst case.
    assert ulps(average.avg_params, models.astype(np.float64).mean(0)) < 40


def test_serialised_and_restored():
    params = {"w": jnp.ones(2), "n": jnp.arange(3)}
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa(compensated=True))
    _, opt_state = tx.update(params, tx.init(params), params)
    data = flax.serialization.to_bytes(opt_state)
    restored = flax.serialization.from_bytes(tx.init(params), data)
    assert structure(restored) == structure(opt_state)
    assert bits(restored) == bits(opt_state)
    _, again = jax.jit(tx.update)(params, restored, params)
    assert int(swa_jax.swa_state(again).num_averaged) == 2


# Memory and devices.


def large() -> dict[str, jax.Array]:
    """1.3 MB of parameters: counters and scalars vanish beside them."""
    return {"w": jnp.ones((512, 512)), "v": jnp.ones((512, 128)), "b": jnp.ones(7)}


@pytest.mark.parametrize("accumulator", [None, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("options", [{}, {"sample": jnp.array(True)}])
def test_update_average_is_in_place(accumulator, options):
    state = compensated_average(large(), accumulator_dtype=accumulator)
    step = jax.jit(swa_jax.update_average, donate_argnums=0)
    compiled = step.lower(state, large(), **options).compile()
    assert_in_place(compiled, donated=state, average=state.avg_params)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_training_step_is_in_place(loop, dtype):
    if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 10):
        pytest.skip(
            "the CPU compiler of older JAX copies bfloat16 weights in this step"
        )
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa(2, 3, compensated=True))
    params = jax.tree.map(lambda x: x.astype(dtype), large())

    def step(carry, _):
        params, opt_state = carry
        grads = jax.tree.map(jnp.sin, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def run(carry):
        return jax.lax.scan(step, carry, length=4)[0] if loop else step(carry, None)[0]

    carry = (params, tx.init(params))
    compiled = jax.jit(run, donate_argnums=0).lower(carry).compile()
    average = swa_jax.swa_state(carry[1]).avg_params
    assert_in_place(compiled, donated=carry, average=average)


def test_params_and_state_may_be_donated_together():
    params = tree(3)
    state = compensated_average(params)
    jax.jit(lambda *trees: trees, donate_argnums=(0, 1))(params, state)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_spread_over_devices(axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    models = (1 + 0.1 * weights(20, 16, 2)).astype(np.float32)
    tx = swa_jax.swa(compensated=True, sharding=spread)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.jit(tx.init)(jax.device_put(models[0], everywhere))
    for model in jax.device_put(list(models), everywhere):
        _, state = jax.jit(tx.update)(jnp.zeros_like(model), state, model)
    for words in (state.avg_params, state.compensation):
        assert words.sharding.is_equivalent_to(spread, 2)
    assert ulps(state.avg_params, models.astype(np.float64).mean(0)) <= ULPS


@pytest.mark.parametrize("wrap", [jax.vmap, jax.pmap])
def test_one_average_a_member(wrap):
    models = (1 + 0.1 * weights(20, 4, 8)).astype(np.float32)
    tx = swa_jax.swa(compensated=True)
    state = wrap(tx.init)(jnp.asarray(models[0]))
    step = wrap(lambda state, model: tx.update(0 * model, state, model)[1])
    for model in models:
        state = step(state, jnp.asarray(model))
    np.testing.assert_array_equal(state.num_averaged, np.full(4, 20))
    assert ulps(state.avg_params, models.astype(np.float64).mean(0)) <= ULPS


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    models = (1 + 0.1 * weights(20, 8, 4)).astype(np.float32)
    tx = swa_jax.swa(compensated=True)
    state = tx.init(models[0])
    split = jax.tree.map(
        lambda x: PartitionSpec("data") if x.ndim else PartitionSpec(), state
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), split),
        out_specs=split,
    )
    def step(model, state):
        return tx.update(jnp.zeros_like(model), state, model)[1]

    for model in models:
        state = step(model, state)
    assert ulps(state.avg_params, models.astype(np.float64).mean(0)) <= ULPS
