"""The running mean itself: dtypes, accuracy, memory, and what it refuses.

Oracles are NumPy means in float64 of the very models that were averaged. U is half a
unit in the last place of a float32 near 1, the relative error of one operation.

The error bound of the running mean, used throughout: step k commits three roundings,
of ``q - mean`` (at most 2M), of the quotient, and of the sum (at most M), hence at
most ``U * M * (1 + 4 / k)`` with M the largest weight; it is then carried into the
mean of n with weight k / n. Summed over k: ``U * M * (n / 2 + 5)``.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import swa_jax

from ..compiled import assert_in_place, memory
from .transformations import accumulate, structure

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

U = 2.0**-24


def running_mean_bound(models: np.ndarray) -> float:
    """Largest error of a float32 running mean over the leading axis."""
    return U * float(np.abs(models).max()) * (len(models) / 2 + 5)


def average_all(models: list, **options) -> swa_jax.SWAState:
    """The average of some models, one ``update_average`` each."""
    state = swa_jax.init_average(models[0], **options)
    for model in models:
        state = swa_jax.update_average(state, model)
    return state


def bits(tree) -> list[bytes]:
    """The exact content of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def types(tree) -> list:
    """Everything about a tree that would make jit compile anew."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef, *map(jax.typeof, leaves)]


def weights(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Some models, stacked."""
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


# The mean.


def test_update_average_is_the_mean_of_all_models():
    models = {"w": weights(13, 4, 3), "b": weights(13, 3, seed=1)}
    state = average_all([{"w": models["w"][i], "b": models["b"][i]} for i in range(13)])
    assert int(state.num_updates) == int(state.num_averaged) == 13
    for name, stacked in models.items():
        np.testing.assert_allclose(
            state.avg_params[name],
            stacked.astype(np.float64).mean(0),
            rtol=0,
            atol=running_mean_bound(stacked),
        )


def test_every_prefix_of_a_run_is_averaged():
    models = weights(9, 5)
    state = swa_jax.init_average(models[0])
    for n, model in enumerate(models, start=1):
        state = swa_jax.update_average(state, model)
        np.testing.assert_allclose(
            state.avg_params,
            models[:n].astype(np.float64).mean(0),
            rtol=0,
            atol=running_mean_bound(models[:n]),
        )


@pytest.mark.parametrize("start", [3.0e38, -3.0e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("first", [0.1, -0.0, 1e-38, 3.0e38])
def test_first_model_replaces_whatever_the_state_was_created_from(start, first):
    # 3e38 and -3e38 differ by more than float32 holds, and 0.1 is lost beside either.
    state = swa_jax.init_average(np.full(3, start, np.float32))
    model = np.full(3, first, np.float32)
    assert bits(swa_jax.update_average(state, model).avg_params) == bits(model)


def test_params_at_creation_are_not_averaged():
    state = swa_jax.init_average(np.full(3, 1e6, np.float32))
    for value in (1.0, 2.0, 6.0):
        state = swa_jax.update_average(state, np.full(3, value, np.float32))
    # 1, then 1.5, then 3: exact in float32; 1e6 among them would show.
    np.testing.assert_array_equal(state.avg_params, np.full(3, 3.0))


def test_skipped_step_keeps_every_bit():
    # NaN payloads and the sign of zero included: `mean + 0 * x` would lose them.
    odd = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    mean = jnp.asarray(odd.view(np.float32))
    state = swa_jax.SWAState(jnp.int32(7), jnp.int32(4), {"w": mean})
    new = jax.jit(accumulate)(state, {"w": jnp.full(4, jnp.nan)}, jnp.array(False))
    assert int(new.num_updates) == 8
    assert bits(new)[1:] == bits(state)[1:]


def test_update_is_differentiable():
    # d mean / d q = 1 / (n + 1) and d mean / d old = n / (n + 1), exact for n = 3.
    def mean(old, new):
        state = swa_jax.SWAState(jnp.int32(3), jnp.int32(3), old)
        return accumulate(state, new, jnp.array(True)).avg_params.sum()

    grads = jax.grad(mean, argnums=(0, 1))(jnp.ones(2), jnp.zeros(2))
    np.testing.assert_array_equal(grads, [[0.75, 0.75], [0.25, 0.25]])


def test_gradient_does_not_see_a_nonfinite_start():
    def mean(new):
        state = swa_jax.init_average(jnp.full(2, jnp.nan))
        return accumulate(state, new).avg_params.sum()

    np.testing.assert_array_equal(jax.grad(mean)(jnp.ones(2)), [1.0, 1.0])


# Deciding which models enter.


@pytest.mark.parametrize("make", [bool, np.bool_, np.asarray, jnp.asarray])
@pytest.mark.parametrize("update", [swa_jax.update_average, swa_jax.averaged_with])
def test_sample(update, make):
    state = swa_jax.init_average({"w": jnp.zeros(2), "n": jnp.int32(0)})
    for value in (1, 2, 3, 4, 5):
        params = {"w": jnp.full(2, float(value)), "n": jnp.int32(value)}
        before = bits(state[1:])
        state = update(state, params, sample=make(value in (2, 5)))
        assert int(state.num_updates) == value
        assert (bits(state[1:]) == before) == (value not in (2, 5))
    assert int(state.num_averaged) == 2
    np.testing.assert_array_equal(state.avg_params["w"], [3.5, 3.5])
    assert int(state.avg_params["n"]) == 5


def test_false_keeps_every_bit():
    odd = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    state = swa_jax.SWAState(jnp.int32(7), jnp.int32(4), odd.view(np.float32))
    new = swa_jax.averaged_with(state, jnp.full(4, jnp.nan), sample=False)
    assert bits(new[1:]) == bits(state[1:])
    assert int(new.num_updates) == 8


def test_sample_compiles_once(caplog):
    params = {"w": jnp.ones((3, 13))}
    state = swa_jax.update_average(
        swa_jax.init_average(params), params, sample=jnp.array(True)
    )
    with jax.log_compiles():
        for sample in (False, True, np.bool_(False), np.array(True), jnp.array(False)):
            state = swa_jax.update_average(state, params, sample=sample)
        assert "Compiling" not in caplog.text
    assert int(state.num_averaged) == 3


def test_traced_sample_in_scan_and_vmap():
    models = weights(7, 3)

    def run(chosen):
        def step(state, pair):
            return swa_jax.averaged_with(state, pair[0], sample=pair[1]), None

        state = swa_jax.init_average(models[0])
        return jax.lax.scan(step, state, (models, chosen))[0]

    chosen = np.array([[0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 1]], bool)
    states = jax.jit(jax.vmap(run))(chosen)
    np.testing.assert_array_equal(states.num_averaged, chosen.sum(1))
    for mean, members in zip(states.avg_params, chosen, strict=True):
        np.testing.assert_allclose(
            mean,
            models[members].astype(np.float64).mean(0),
            rtol=0,
            atol=running_mean_bound(models[members]),
        )


def test_update_with_sample_is_in_place():
    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((256, 64), jnp.bfloat16)}
    old = swa_jax.init_average(params)
    step = jax.jit(swa_jax.update_average, donate_argnums=0)
    compiled = step.lower(old, params, sample=jnp.array(True)).compile()
    assert_in_place(compiled, donated=old, average=old.avg_params)
    swa_jax.update_average(old, params, sample=False)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))


def test_averaged_with_donates_nothing():
    params = {"w": jnp.ones(16), "n": jnp.arange(3)}
    old = swa_jax.init_average(params)
    before = bits(old)
    first, second = (swa_jax.averaged_with(old, params) for _ in range(2))
    assert bits(first) == bits(second)
    assert bits(old) == before
    assert not any(x.is_deleted() for x in jax.tree.leaves((old, params)))


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (1, TypeError, "got a int. Fix: compare"),
        ("yes", TypeError, "got a str"),
        (np.int32(1), TypeError, "got a int32"),
        (jnp.int32(1), TypeError, "got an array of int32"),
        (np.ones(()), TypeError, "got an array of float64"),
        (jnp.array([True]), ValueError, r"must be a scalar, got shape \(1,\)"),
        (np.array([True, False]), ValueError, r"must be a scalar, got shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_refused_samples(sample, error, message, jit):
    if jit and not isinstance(sample, jax.Array):
        pytest.skip("jit takes arrays")
    state = swa_jax.init_average(jnp.ones(2))
    update = jax.jit(swa_jax.update_average) if jit else swa_jax.update_average
    with pytest.raises(error, match=rf"update_average: sample .*{message}"):
        update(state, jnp.ones(2), sample=sample)
    swa_jax.update_average(state, jnp.ones(2))  # nothing was donated


@pytest.mark.parametrize("update", [swa_jax.update_average, swa_jax.averaged_with])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_skip_nonfinite(update, bad):
    state = swa_jax.init_average({"w": jnp.zeros(3), "s": 0.0})
    for value in (1.0, bad, 3.0):
        params = {"w": np.array([1, value, 5], np.float32), "s": value}
        state = update(state, params, skip_nonfinite=True)
    assert (int(state.num_updates), int(state.num_averaged)) == (3, 2)
    np.testing.assert_array_equal(state.avg_params["w"], [1.0, 2.0, 5.0])
    # Both conditions hold together.
    for sample, expected in ((True, 3), (False, 3)):
        good = {"w": np.ones(3, np.float32), "s": 1.0}
        state = update(state, good, sample=sample, skip_nonfinite=True)
        assert int(state.num_averaged) == expected
    _, state = (
        None,
        update(state, params | {"s": bad}, sample=True, skip_nonfinite=True),
    )
    assert int(state.num_averaged) == 3


# Dtypes.


def check_dtypes(cases, accumulator_dtype=None) -> None:
    """Averages a tree with a leaf of each dtype; compares the mean's dtypes."""
    params = {jnp.dtype(d).name: jnp.ones(3, d) for d in cases}
    state = swa_jax.init_average(params, accumulator_dtype=accumulator_dtype)
    expected = {jnp.dtype(d).name: jnp.dtype(e) for d, e in cases.items()}
    for _ in range(2):
        found = jax.tree.map(lambda x: x.dtype, state.avg_params)
        assert found == expected
        state = swa_jax.update_average(state, params)
    assert state.num_updates.dtype == state.num_averaged.dtype == jnp.int32
    chex.assert_trees_all_equal_dtypes(swa_jax.swa_params(state, params), params)
    chex.assert_trees_all_equal(swa_jax.swa_params(state, params), params)


def test_default_accumulator():
    check_dtypes(
        {
            jnp.float8_e4m3fn: jnp.float32,
            jnp.float8_e5m2: jnp.float32,
            jnp.bfloat16: jnp.float32,
            jnp.float16: jnp.float32,
            jnp.float32: jnp.float32,
            jnp.complex64: jnp.complex64,
            jnp.int32: jnp.int32,
            jnp.uint8: jnp.uint8,
            jnp.int4: jnp.int4,
            jnp.bool_: jnp.bool_,
        }
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_requested_accumulator(name):
    check_dtypes(
        {
            jnp.float8_e4m3fn: name,
            jnp.bfloat16: name,
            jnp.float32: name,
            jnp.complex64: jnp.complex64,  # has no narrower kind
            jnp.int32: jnp.int32,
        },
        getattr(jnp, name),
    )


@pytest.mark.usefixtures("enable_x64")
def test_accumulators_with_x64():
    check_dtypes(
        {
            jnp.bfloat16: jnp.float32,
            jnp.float64: jnp.float64,
            jnp.complex128: jnp.complex128,
            jnp.int64: jnp.int64,
        }
    )
    check_dtypes(
        {
            jnp.bfloat16: jnp.float64,
            jnp.float32: jnp.float64,
            jnp.complex64: jnp.complex128,
        },
        "float64",
    )
    check_dtypes({jnp.float64: jnp.float32, jnp.complex128: jnp.complex128}, "float32")


@pytest.mark.usefixtures("enable_x64")
def test_float64_weights_are_averaged_in_float64():
    models = np.random.default_rng(0).normal(size=(11, 6))
    state = average_all([jnp.asarray(model) for model in models])
    np.testing.assert_allclose(
        state.avg_params,
        models.mean(0),
        rtol=0,
        # The bound of a float32 mean, with float64's half ulp in place of U.
        atol=running_mean_bound(models) * 2.0**-53 / U,
    )


def test_complex_weights():
    models = (weights(7, 4) + 1j * weights(7, 4, seed=1)).astype(np.complex64)
    state = average_all(list(models))
    np.testing.assert_allclose(
        state.avg_params,
        models.astype(np.complex128).mean(0),
        rtol=0,
        # Both parts round, and complex division costs a few more operations.
        atol=4 * running_mean_bound(models),
    )


def mean_of_10_000(dtype, accumulator_dtype=None) -> tuple[np.ndarray, np.ndarray]:
    """The mean of 10,000 noisy models as computed, and in float64."""
    models = (1 + 0.1 * weights(10_000, 16)).astype(dtype)
    state = swa_jax.init_average(
        jnp.asarray(models[0]), accumulator_dtype=accumulator_dtype
    )

    @jax.jit
    def run(state, models):
        step = lambda state, model: (accumulate(state, model), None)  # noqa: E731
        return jax.lax.scan(step, state, models)[0]

    state = run(state, models)
    assert int(state.num_averaged) == 10_000
    return np.asarray(state.avg_params, np.float64), models.astype(np.float64).mean(0)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_10_000_models_in_the_default_accumulator(dtype):
    mean, expected = mean_of_10_000(dtype)
    # Roundings are as often up as down, so they add up to about U * sqrt(n / 12)
    # = 2e-6 instead of the worst case U * n / 2 = 3e-4. A bfloat16 mean is off by
    # 4e-3 from its last cast alone.
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_10_000_models_in_a_bfloat16_accumulator_drift():
    # Why the default is float32: newcomers vanish below bfloat16's spacing of 2^-7.
    mean, expected = mean_of_10_000(ml_dtypes.bfloat16, jnp.bfloat16)
    assert np.abs(mean - expected).max() > 1e-2


def test_float16_accumulator_rounds_once_a_step():
    models = weights(8, 64).astype(np.float16)
    state = average_all(list(models), accumulator_dtype=jnp.float16)
    assert state.avg_params.dtype == jnp.float16
    mean = models[0]
    for n, model in enumerate(models[1:], start=2):
        wide = mean.astype(np.float64)
        mean = (wide + (model.astype(np.float64) - wide) / n).astype(np.float16)
    # float32 on the way instead of float64 may flip a tie, one float16 ulp (of
    # numbers below 4), in a rare element.
    np.testing.assert_allclose(
        np.asarray(state.avg_params, np.float64), mean, rtol=0, atol=2.0**-9
    )
    assert np.mean(np.asarray(state.avg_params) == mean) > 0.95


def test_half_precision_weights_do_not_overflow():
    # Their difference, 1.2e5, is beyond float16.
    low, high = np.full(2, -6e4, np.float16), np.full(2, 6e4, np.float16)
    for dtype in (None, jnp.float16):
        state = average_all([low, high], accumulator_dtype=dtype)
        np.testing.assert_array_equal(state.avg_params, np.zeros(2))


def narrow_dtypes() -> list[np.dtype]:
    """Floating dtypes of a byte or less that arrays can have here."""
    found = []
    for name in dir(ml_dtypes):
        # Of six bits jax 0.12 has dtypes that XLA's CPU compiler cannot even cast.
        if not name.startswith(("float8", "float4")):
            continue
        try:
            jnp.ones(1, getattr(ml_dtypes, name))
        except (TypeError, ValueError, RuntimeError):
            continue
        found.append(np.dtype(getattr(ml_dtypes, name)))
    return found


def test_narrow_dtypes_are_found():
    assert len(narrow_dtypes()) >= 5


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("dtype", narrow_dtypes(), ids=str)
def test_narrow_weights(dtype, skip_nonfinite):
    # One of them has no sign and no zero, others no infinity, one no NaN.
    info = ml_dtypes.finfo(dtype)
    numbers = np.array([1, 2, 0.5, 4, info.max, 1.5, 2])
    models = np.stack([np.roll(numbers, i)[:4] for i in range(7)]).astype(dtype)
    tx = swa_jax.swa(skip_nonfinite=skip_nonfinite)
    state = swa_jax.init_average(jnp.asarray(models[0]))
    opt_state = tx.init(jnp.asarray(models[0]))
    for model in models:
        state = swa_jax.update_average(state, model, skip_nonfinite=skip_nonfinite)
        _, opt_state = tx.update(None, opt_state, jnp.asarray(model))
    expected = models.astype(np.float64).mean(0)
    for found in (state, opt_state):
        assert int(found.num_averaged) == 7
        np.testing.assert_allclose(found.avg_params, expected, rtol=16 * U)


@pytest.mark.parametrize("dtype", narrow_dtypes(), ids=str)
def test_narrow_weights_that_are_not_finite(dtype):
    state = swa_jax.init_average(jnp.ones(2, dtype))
    for value in (np.nan, np.inf):
        model = np.array([1, value]).astype(dtype)
        finite = bool(np.isfinite(model.astype(np.float32)).all())
        state = swa_jax.averaged_with(state, model, skip_nonfinite=True)
        assert int(state.num_averaged) == finite
        state = state._replace(num_averaged=jnp.int32(0))


# Leaves that are no weights.


def test_integer_leaves_carry_the_latest_model():
    models = [
        {"w": np.array([i], np.float32), "steps": np.array([10 * i], np.int32)}
        for i in range(1, 5)
    ]
    state = average_all(models)
    np.testing.assert_array_equal(state.avg_params["w"], [2.5])
    np.testing.assert_array_equal(state.avg_params["steps"], [40])


def test_integer_leaves_keep_values_that_no_float_holds():
    big = np.array([2**31 - 1, -(2**31), 2**24 + 1], np.int32)
    assert bits(average_all([big, big, big]).avg_params) == bits(big)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_prng_keys_carry_the_latest_model(make):
    keys = [make(seed) for seed in (1, 2, 3)]
    models = [{"w": jnp.float32(seed), "key": key} for seed, key in enumerate(keys)]
    state = average_all(models)
    draws = [
        float(jax.random.uniform(key))
        for key in (
            state.avg_params["key"],
            swa_jax.swa_params(state, models[-1])["key"],
            keys[-1],
        )
    ]
    assert draws[0] == draws[1] == draws[2]
    chex.assert_trees_all_equal(state.avg_params["w"], jnp.float32(1.0))


def test_none_and_masked_leaves_survive():
    params = {"w": jnp.ones(2), "none": None, "hidden": optax.MaskedNode(), "empty": {}}
    state = average_all([params, jax.tree.map(lambda x: 3 * x, params)])
    assert structure(state.avg_params) == structure(params)
    np.testing.assert_array_equal(state.avg_params["w"], [2.0, 2.0])
    assert swa_jax.swa_params(state, params)["none"] is None


@pytest.mark.parametrize("empty", [{}, (), None, {"layer": {}}])
def test_empty_tree(empty):
    state = average_all([empty, empty])
    assert int(state.num_averaged) == 2
    assert state.avg_params == empty
    assert swa_jax.swa_params(state, empty) == empty


def test_python_scalars_and_numpy_arrays():
    models = [
        {"scalar": 1.0, "np_scalar": np.float32(2), "array": np.zeros((2, 1))},
        {"scalar": 2.0, "np_scalar": np.float32(4), "array": np.ones((2, 1))},
    ]
    state = average_all(models)
    expected = {"scalar": 1.5, "np_scalar": 3.0, "array": np.full((2, 1), 0.5)}
    chex.assert_trees_all_equal(state.avg_params, jax.tree.map(np.float32, expected))
    read = swa_jax.swa_params(state, models[-1])
    chex.assert_trees_all_equal(read, jax.tree.map(np.float32, expected))


def test_numpy_params_are_copied():
    params = np.ones((64, 64), np.float32)
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    jax.block_until_ready(state)  # JAX may read a NumPy array until then
    params[:] = 5.0  # an optimizer in NumPy works in place
    np.testing.assert_array_equal(state.avg_params, np.ones((64, 64)))


def test_abstract_leaves_start_from_zeros():
    # As in Optax: `optax.adam(0.1).init` of shapes gives arrays.
    params = {
        "f32": jax.ShapeDtypeStruct((2, 3), jnp.float32),
        "bf16": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
        "int": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.ShapeDtypeStruct((2,), jax.random.key(0).dtype),
    }
    for state in (swa_jax.init_average(params), swa_jax.swa().init(params)):
        mean = {name: leaf for name, leaf in state.avg_params.items() if name != "key"}
        expected = {
            "f32": np.zeros((2, 3), np.float32),
            "bf16": np.zeros(4, np.float32),
            "int": np.zeros((), np.int32),
        }
        chex.assert_trees_all_equal(mean, expected)
        assert state.avg_params["key"].dtype == params["key"].dtype
        concrete = jax.tree.map(jnp.ones_like, expected) | {
            "bf16": jnp.ones(4, jnp.bfloat16),
            "key": jax.random.split(jax.random.key(1)),
        }
        state = swa_jax.update_average(state, concrete)
        chex.assert_trees_all_equal(swa_jax.swa_params(state, concrete), concrete)


def test_abstract_leaves_cannot_be_averaged():
    state = swa_jax.init_average({"w": jnp.ones(2)})
    shape = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(TypeError, match=r"params\['w'\] is a ShapeDtypeStruct.*Fix: "):
        swa_jax.update_average(state, shape)
    new = jax.eval_shape(swa_jax.update_average, state, shape)
    assert new.avg_params["w"].shape == (2,)


NO_ARRAYS = [jnp.tanh, lambda x: x, "relu", np, object(), np.array(["a"])]


@pytest.mark.parametrize("leaf", NO_ARRAYS, ids=lambda leaf: type(leaf).__name__)
def test_leaves_that_are_no_arrays_are_named(leaf):
    good = {"w": jnp.ones(2), "layers": [{"activation": jnp.ones(())}]}
    bad = {"w": jnp.ones(2), "layers": [{"activation": leaf}]}
    tx = swa_jax.swa()
    where = rf"params\['layers'\]\[0\]\['activation'\] is a {type(leaf).__name__}"
    for caller, call in {
        "init_average": lambda: swa_jax.init_average(bad),
        "swa: init": lambda: tx.init(bad),
        "update_average": lambda: swa_jax.update_average(tx.init(good), bad),
        "swa": lambda: tx.update(good, tx.init(good), bad),
    }.items():
        caller = caller.split(":")[0]
        message = rf"^{caller}: {where}, where .*Fix: .*equinox.filter.*optax.masked"
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match=rf"^swa: {where.replace('params', 'updates')}"):
        tx.update(bad, tx.init(good), good)


def test_leaves_that_are_no_arrays_may_be_hidden():
    # The way out that the message names.
    params = {"w": jnp.ones(2), "activation": jnp.tanh}
    tx = optax.masked(swa_jax.swa(), {"w": True, "activation": False})
    state = tx.init(params)
    updates = {"w": jnp.ones(2), "activation": None}
    _, state = tx.update(updates, state, params)
    average = swa_jax.swa_params(state, params)
    np.testing.assert_array_equal(average["w"], [2.0, 2.0])
    assert average["activation"] is jnp.tanh


# Buffers.


@pytest.mark.parametrize("jit", [False, True])
def test_init_does_not_alias_params(jit):
    params = {
        "float32": jnp.ones((32, 32)),
        "bfloat16": jnp.ones((32, 32), jnp.bfloat16),
        "int32": jnp.arange(5),
        "scalar": jnp.zeros(()),
        "key": jax.random.key(3),
    }
    expected = types(params)
    state = (jax.jit(swa_jax.init_average) if jit else swa_jax.init_average)(params)
    both = jax.jit(lambda *trees: trees, donate_argnums=(0, 1))
    # A buffer that is donated twice, or read after it was donated, is an error.
    params, state = both(params, state)
    params, state = both(params, state)
    assert types(params) == expected
    np.testing.assert_array_equal(state.avg_params["int32"], np.arange(5))
    draw = jax.random.uniform(state.avg_params["key"])
    assert draw == jax.random.uniform(jax.random.key(3))


def test_init_gives_every_field_a_buffer_of_its_own():
    params = {"a": jnp.ones(8), "b": jnp.ones(8)}
    params["tied"] = params["a"]
    leaves = jax.tree.leaves((swa_jax.init_average(params), params["a"], params["b"]))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_update_average_donates_the_state_and_nothing_else():
    params = {"w": jnp.ones((16, 16)), "b": jnp.ones(16, jnp.bfloat16)}
    old = swa_jax.init_average(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(old)]
    new = swa_jax.update_average(old, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(new)] == pointers


def test_average_does_not_alias_the_model_that_entered():
    params = {"w": jnp.ones((16, 16)), "i": jnp.arange(4)}
    state = swa_jax.update_average(swa_jax.init_average(params), params)
    expected = bits(params)
    jax.jit(lambda p: jax.tree.map(lambda x: 0 * x, p), donate_argnums=0)(params)
    assert bits(state.avg_params) == expected


def test_update_average_is_in_place():
    params = {"a": jnp.ones((512, 512)), "b": jnp.ones((256, 64), jnp.bfloat16)}
    state = swa_jax.init_average(params)
    step = jax.jit(swa_jax.update_average, donate_argnums=0)
    compiled = step.lower(state, params).compile()
    assert_in_place(compiled, donated=state, average=state.avg_params)


def test_average_made_in_a_loop_is_in_place():
    state = swa_jax.init_average({"a": jnp.ones((256, 256)), "b": jnp.ones(64)})

    def run(state, scales):
        def step(state, scale):
            model = jax.tree.map(lambda x: jnp.sin(x * scale), state.avg_params)
            return accumulate(state, model, scale > 1), None

        return jax.lax.scan(step, state, scales)[0]

    lowered = jax.jit(run, donate_argnums=0).lower(state, jnp.arange(4.0))
    assert_in_place(lowered.compile(), donated=state, average=state.avg_params)


def test_the_check_notices_a_state_that_is_not_donated():
    state = swa_jax.init_average({"a": jnp.ones((256, 256))})
    compiled = jax.jit(accumulate).lower(state, state.avg_params).compile()
    assert memory(compiled).aliased == 0
    with pytest.raises(AssertionError, match="not all in place"):
        assert_in_place(compiled, donated=state, average=state.avg_params)


# Compilation.


def test_types_do_not_change():
    params = {
        "weak": jnp.asarray(1.0),
        "bf16": jnp.ones(2, jnp.bfloat16),
        "int": jnp.asarray(3),
        "complex": jnp.ones(2, jnp.complex64),
    }
    assert params["weak"].weak_type
    assert params["int"].weak_type
    state = swa_jax.init_average(params)
    before = types(state)
    assert not any(x.weak_type for x in jax.tree.leaves(state))
    assert types(jax.jit(swa_jax.init_average)(params)) == before
    state = swa_jax.update_average(state, params)
    assert types(state) == before
    assert types(jax.jit(accumulate)(state, params, jnp.array(True))) == before


def test_one_trace_for_many_models():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, params):
        return swa_jax.update_average(state, params)

    state = swa_jax.init_average(jnp.ones(3))
    for value in range(5):
        state = step(state, jnp.full(3, value, jnp.float32))
    np.testing.assert_array_equal(state.avg_params, np.full(3, 2.0))


def test_update_average_compiles_once(caplog):
    # A weakly typed integer once made the second call compile anew.
    params = {"w": jnp.ones((3, 11)), "weak": jnp.asarray(1.0), "i": jnp.asarray(3)}
    state = swa_jax.init_average(params)
    with jax.log_compiles():
        state = swa_jax.update_average(state, params)
        assert "Compiling" in caplog.text  # the log is where we look for it
        caplog.clear()
        for _ in range(3):
            state = swa_jax.update_average(state, params)
        assert "Compiling" not in caplog.text


def test_update_average_inside_jit_and_scan():
    models = weights(6, 3)

    @jax.jit
    def run(models):
        step = lambda s, m: (swa_jax.update_average(s, m), None)  # noqa: E731
        return jax.lax.scan(step, swa_jax.init_average(models[0]), models)[0]

    np.testing.assert_allclose(
        run(models).avg_params,
        models.astype(np.float64).mean(0),
        rtol=0,
        atol=running_mean_bound(models),
    )


def test_counters_saturate():
    # 2^31 - 1 models: wrapping around would start the mean anew with a minus sign.
    most = np.iinfo(np.int32).max
    state = swa_jax.SWAState(jnp.int32(most), jnp.int32(most), jnp.ones(2))
    state = swa_jax.update_average(state, np.full(2, 5.0, np.float32))
    assert int(state.num_updates) == int(state.num_averaged) == most
    np.testing.assert_array_equal(state.avg_params, np.ones(2))


def test_vmap_averages_each_member_of_an_ensemble():
    models = weights(5, 4, 3)  # 5 epochs, 4 members
    state = jax.vmap(swa_jax.init_average)(jnp.asarray(models[0]))
    for model in models:
        state = jax.vmap(swa_jax.update_average)(state, jnp.asarray(model))
    np.testing.assert_array_equal(state.num_averaged, np.full(4, 5))
    np.testing.assert_allclose(
        state.avg_params,
        models.astype(np.float64).mean(0),
        rtol=0,
        atol=running_mean_bound(models),
    )


# Bad input.


@pytest.mark.parametrize("dtype", [jnp.int32, "int8", bool, jnp.complex64, "float7", 3])
def test_accumulator_must_be_floating(dtype):
    with pytest.raises(
        TypeError, match=r"accumulator_dtype must be a floating dtype.*float32, got"
    ):
        swa_jax.init_average(jnp.ones(2), accumulator_dtype=dtype)


def test_float64_accumulator_needs_x64():
    with pytest.raises(
        ValueError, match=r"accumulator_dtype=float64 .*jax_enable_x64.*float32"
    ):
        swa_jax.init_average(jnp.ones(2), accumulator_dtype=jnp.float64)


GOOD: dict[str, Any] = {
    "a": np.ones((2, 3), np.float32),
    "b": {"c": np.ones(4, np.float32)},
}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": GOOD["a"]}, r"only in the state's average: \['b'\]\['c'\]"),
        ({**GOOD, "d": 1.0}, r"only in params: \['d'\]"),
        ({**GOOD, "a": None}, r"only in the state's average: \['a'\]"),
        (None, r"structure.*only in the state"),
        ([GOOD["a"], GOOD["b"]["c"]], r"structure"),
        ({**GOOD, "a": np.ones((3, 2), np.float32)}, r"\['a'\].*\(3, 2\).*\(2, 3\)"),
        ({**GOOD, "a": np.ones((1, 3), np.float32)}, r"\['a'\].*\(1, 3\).*\(2, 3\)"),
        ({**GOOD, "a": np.float32(1)}, r"\['a'\] has shape \(\).*\(2, 3\)"),
        ({**GOOD, "a": np.ones((2, 3), np.int32)}, r"\['a'\] has dtype int32.*float32"),
        (
            {**GOOD, "a": np.ones((2, 3), np.complex64)},
            r"\['a'\] has dtype complex64.*float32",
        ),
    ],
)
def test_update_average_refuses_another_model(params, message):
    state = swa_jax.init_average(GOOD)
    with pytest.raises(
        ValueError, match=rf"(?s)update_average: params.*{message}.*Fix: pass the param"
    ):
        swa_jax.update_average(state, params)
    # Nothing is lost: the state was not donated and goes on.
    state = swa_jax.update_average(state, GOOD)
    chex.assert_trees_all_equal(state.avg_params, GOOD)


@pytest.mark.parametrize("key", ["same containers", "another type of key"])
def test_update_average_tells_containers_and_keys_apart(key):
    state = swa_jax.init_average({"k": (jnp.ones(2), jnp.ones(2))})
    other: list[jax.Array] | jax.Array = [jnp.ones(2), jnp.ones(2)]
    if key == "another type of key":
        state = swa_jax.init_average({"k": jnp.zeros(2, jnp.uint32)})
        other = jax.random.key(0)
    with pytest.raises(ValueError, match=r"update_average: params"):
        swa_jax.update_average(state, {"k": other})


@pytest.mark.parametrize(
    "state", [None, {"w": jnp.ones(2)}, (jnp.int32(0), jnp.int32(0), jnp.ones(2))]
)
def test_update_average_needs_a_state(state):
    with pytest.raises(
        TypeError,
        match=rf"state must be an SWAState, got {type(state).__name__}.*init_average",
    ):
        swa_jax.update_average(state, jnp.ones(2))


def test_update_average_refuses_an_optimizer_state():
    params = jnp.ones(2)
    opt_state = optax.chain(optax.sgd(0.1), swa_jax.swa()).init(params)
    with pytest.raises(TypeError, match="state must be an SWAState, got tuple"):
        swa_jax.update_average(opt_state, params)


def test_core_does_no_work_at_import():
    # Field defaults that are arrays would start a backend.
    assert swa_jax.SWAState._field_defaults == {}
    assert swa_jax.SWAState._fields == ("num_updates", "num_averaged", "avg_params")
