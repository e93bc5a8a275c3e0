"""``swa()``: which weights enter the mean.

Oracles are NumPy float64 means over the weights that the loop itself stored. The bound
on a float32 running mean of n models no larger than M, ``U * M * (n / 2 + 5)``, is
derived in test_averaging.py.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import swa_jax

#: The default run takes two cases of each test here, see conftest.py.
pytestmark = pytest.mark.sample(2)

U = 2.0**-24
STEPS = 24  # long enough for several periods of every schedule drawn below


def bits(tree) -> list[bytes]:
    """The exact content of every leaf."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def follow(state: swa_jax.SWAState, tx, models) -> list[swa_jax.SWAState]:
    """The states after each model, which arrives as params + updates."""
    states, update = [], jax.jit(tx.update)
    for model in models:
        _, state = update(jax.tree.map(jnp.zeros_like, model), state, model)
        states.append(state)
    return states


# Sampling.


def rule(t: int, start_step: int, period: int, stop_step: int | None) -> bool:
    """The documented rule, for update number t (the first is 1)."""
    return (
        t >= 1
        and t >= start_step
        and (t - start_step) % period == 0
        and (stop_step is None or t <= stop_step)
    )


def train(start_step, period, stop_step, noise):
    """SGD with noisy gradients: every step's stored params and state."""
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.5),
        swa_jax.swa(start_step, period, stop_step=stop_step),
    )

    def step(carry, noise):
        params, opt_state = carry
        grads = jax.tree.map(lambda w: 0.3 * w + noise[: w.shape[0]], params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, swa_jax.swa_state(opt_state))

    # Far from where training goes: a mean that included them would be far off.
    params = {"w": jnp.full(5, 1000.0), "b": jnp.full(2, -1000.0)}
    return jax.lax.scan(step, (params, tx.init(params)), noise)[1]


# One program for all drawn steps, which arrive as tracers, as from inject_hyperparams.
train_traced = jax.jit(train)
train_static = functools.partial(jax.jit, static_argnums=(0, 1, 2))(train)


def check_run(history, states, start_step, period, stop_step):
    """Compares every step of a run with the rule and with NumPy."""
    history, states = jax.device_get((history, states))
    averaged: list[int] = []
    for t in range(1, STEPS + 1):
        now = jax.tree.map(lambda x, i=t - 1: x[i], states)
        sampled = rule(t, start_step, period, stop_step)
        if sampled:
            averaged.append(t - 1)
        elif t > 1:
            before = jax.tree.map(lambda x, i=t - 2: x[i], states)
            assert bits(now.avg_params) == bits(before.avg_params)
        assert now.num_updates == t
        assert now.num_averaged == len(averaged)
        if not sampled:
            continue
        for name, stored in history.items():
            models = stored[averaged].astype(np.float64)
            if len(averaged) == 1:
                assert bits(now.avg_params[name]) == bits(stored[t - 1])
            np.testing.assert_allclose(
                now.avg_params[name],
                models.mean(0),
                rtol=0,
                atol=U * np.abs(models).max() * (len(models) / 2 + 5),
            )


steps = st.tuples(
    st.integers(0, STEPS + 3),
    st.integers(1, 9),
    st.one_of(st.just(0), st.integers(1, STEPS)),
)


@given(steps, st.integers(0, 2**32 - 1))
@example((0, 1, 0), 0)
@example((1, 1, 0), 0)
@example((0, 7, 0), 0)
@example((1, 7, 0), 0)
@example((STEPS, 1, 0), 0)
@example((STEPS + 1, 1, 0), 0)
@settings(max_examples=50, deadline=None)
def test_sampling_and_mean(steps, seed):
    start_step, period, length = steps
    stop_step = start_step + length
    noise = np.random.default_rng(seed).normal(size=(STEPS, 5)).astype(np.float32)
    history, states = train_traced(start_step, period, stop_step, noise)
    check_run(history, states, start_step, period, stop_step)


@given(steps)
@settings(max_examples=5, deadline=None)
def test_sampling_and_mean_with_static_steps(steps):
    start_step, period, length = steps
    stop_step = start_step + length if length else None
    noise = np.random.default_rng(0).normal(size=(STEPS, 5)).astype(np.float32)
    history, states = train_static(start_step, period, stop_step, noise)
    check_run(history, states, start_step, period, stop_step)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"start_step": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"start_step": 0, "period": 3}, [3, 6, 9]),
        ({"start_step": 1, "period": 3}, [1, 4, 7, 10]),
        ({"start_step": 2, "period": 3}, [2, 5, 8]),
        ({"start_step": 3, "period": 3}, [3, 6, 9]),
        ({"start_step": 4, "period": 3, "stop_step": 8}, [4, 7]),
        ({"start_step": 4, "period": 3, "stop_step": 7}, [4, 7]),
        ({"start_step": 4, "period": 3, "stop_step": 6}, [4]),
        ({"start_step": 5, "stop_step": 5}, [5]),
        ({"start_step": 10}, [10]),
        ({"start_step": 11}, []),
        ({"start_step": 0, "period": 10}, [10]),
        ({"start_step": 0, "period": 11}, []),
        ({"start_step": 0, "stop_step": 0}, []),
        ({"start_step": np.int64(9), "period": np.uint8(1)}, [9, 10]),
    ],
)
def test_which_updates_are_averaged(arguments, expected):
    # Powers of two: the first model averaged and the count tell exactly which.
    tx = swa_jax.swa(**arguments)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(()))
    averaged = []
    for t in range(1, 11):
        _, new = update(jnp.float32(2.0**t), state, jnp.zeros(()))
        if new.num_averaged > state.num_averaged:
            averaged.append(t)
        state = new
    assert averaged == expected
    if expected:
        mean = sum(2.0**t for t in expected) / len(expected)
        np.testing.assert_allclose(state.avg_params, mean, rtol=4 * U * len(expected))


def test_steps_up_to_the_end_of_int32():
    last = np.iinfo(np.int32).max
    tx = swa_jax.swa(last, last, stop_step=last)
    state = tx.init(jnp.zeros(2))._replace(num_updates=jnp.int32(last - 2))
    states = follow(state, tx, [np.full(2, x, np.float32) for x in (1, 2, 3)])
    assert [int(s.num_updates) for s in states] == [last - 1, last, last]
    assert int(states[0].num_averaged) == 0
    np.testing.assert_array_equal(states[1].avg_params, [2.0, 2.0])


@pytest.mark.parametrize("start", [3e38, np.nan, np.inf])
def test_first_model_is_exact_whatever_the_initial_weights(start):
    tx = swa_jax.swa(2)
    state = tx.init(np.full(3, start, np.float32))
    models = [np.full(3, x, np.float32) for x in (start, 0.1)]
    states = follow(state, tx, models)
    assert int(states[-1].num_averaged) == 1
    assert bits(states[-1].avg_params) == bits(models[-1])


def test_post_update_weights_enter_as_they_are_stored():
    # In bfloat16, 1 + 2^-8 rounds back to 1: the stored weights never move, and
    # neither may the mean, although float32 would hold the sum.
    tx = optax.chain(optax.sgd(1.0), swa_jax.swa())
    params = jnp.ones(4, jnp.bfloat16)
    opt_state = tx.init(params)
    grads = jnp.full(4, -(2.0**-8), jnp.bfloat16)
    for _ in range(3):
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, np.ones(4))
    np.testing.assert_array_equal(opt_state[-1].avg_params, np.ones(4))


def test_updates_of_another_dtype_are_cast_like_apply_updates_does():
    tx = swa_jax.swa()
    params = {"w": jnp.ones(2, jnp.float16), "n": jnp.array([1, 2])}
    updates = {
        "w": np.full(2, 1e-4, np.float32),  # below float16's spacing at 1
        "n": np.array([0.6, 0.4], np.float32),
    }
    _, state = tx.update(updates, tx.init(params), params)
    stored = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(
        state.avg_params, {"w": stored["w"].astype(jnp.float32), "n": stored["n"]}
    )
    chex.assert_trees_all_equal(swa_jax.swa_params(state, params), stored)


@pytest.mark.parametrize("nothing", [None, optax.MaskedNode(), "float0"])
def test_leaves_without_an_update(nothing):
    if nothing == "float0":  # what jax.grad(..., allow_int=True) gives for integers
        nothing = np.zeros(3, jax.dtypes.float0)
    tx = swa_jax.swa()
    params = {"w": jnp.ones(2), "table": jnp.arange(3), "none": None}
    updates = {"w": jnp.ones(2), "table": nothing, "none": None}
    out, state = tx.update(updates, tx.init(params), params)
    assert out is updates
    np.testing.assert_array_equal(state.avg_params["w"], [2.0, 2.0])
    np.testing.assert_array_equal(state.avg_params["table"], [0, 1, 2])
    assert state.avg_params["none"] is None


def test_prng_key_leaves():
    tx = swa_jax.swa()
    params = {"w": jnp.ones(2), "key": jax.random.key(7)}
    updates = {"w": jnp.ones(2), "key": np.zeros((), jax.dtypes.float0)}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(updates, state, params)
    for tree in (state.avg_params, swa_jax.swa_params(state, params)):
        assert jax.random.key_data(tree["key"]).tolist() == [0, 7]
        np.testing.assert_array_equal(tree["w"], [2.0, 2.0])


def test_non_float_leaves_keep_their_bits_on_skipped_steps():
    tx = swa_jax.swa(start_step=2, period=2)
    models = [{"w": np.float32(i), "n": np.int32(i)} for i in range(1, 6)]
    states = follow(tx.init(models[0]), tx, models)
    assert [int(s.avg_params["n"]) for s in states[1:]] == [2, 2, 4, 4]


# Models that are not finite.


skipping = swa_jax.swa(skip_nonfinite=True)


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (np.nan, jnp.float32),
        (np.inf, jnp.float32),
        (-np.inf, jnp.float32),
        (np.nan, jnp.bfloat16),
        (complex(1, np.inf), jnp.complex64),
    ],
)
def test_skip_nonfinite(bad, dtype):
    tx = skipping
    models = [
        {"a": jnp.full((2, 2), value, dtype), "n": jnp.int32(i)}
        for i, value in enumerate([1.0, 2.0, 6.0])
    ]
    broken = {"a": models[0]["a"].at[1, 0].set(bad), "n": jnp.int32(9)}
    states = follow(tx.init(models[0]), tx, [broken, *models[:2], broken, models[2]])
    assert [int(s.num_updates) for s in states] == [1, 2, 3, 4, 5]
    assert [int(s.num_averaged) for s in states] == [0, 1, 2, 2, 3]
    assert bits(states[3].avg_params) == bits(states[2].avg_params)
    chex.assert_trees_all_equal(
        states[-1].avg_params,
        {"a": np.full((2, 2), 3.0, states[-1].avg_params["a"].dtype), "n": np.int32(2)},
    )


def test_nonfinite_in_any_leaf_counts():
    tx = swa_jax.swa(skip_nonfinite=True)
    good = {"a": np.ones(2, np.float32), "b": np.ones((), np.float32)}
    for name in good:
        broken = {**good, name: np.full_like(good[name], np.nan)}
        states = follow(tx.init(good), tx, [good, broken, good])
        assert [int(s.num_averaged) for s in states] == [1, 1, 2]
        chex.assert_tree_all_finite(states[-1].avg_params)


def test_weights_that_overflow_when_stored_are_not_finite():
    # The update is finite; float16 weights are not after it.
    tx = swa_jax.swa(skip_nonfinite=True)
    params = jnp.full(2, 6e4, jnp.float16)
    _, state = tx.update(jnp.full(2, 6e4, jnp.float16), tx.init(params), params)
    assert int(state.num_averaged) == 0


def test_without_skip_nonfinite_nan_enters():
    # The default hides nothing: it costs a read of all weights to look.
    tx = swa_jax.swa()
    models = [np.ones(2, np.float32), np.array([1, np.nan], np.float32)]
    state = follow(tx.init(models[0]), tx, models)[-1]
    assert int(state.num_averaged) == 2
    np.testing.assert_array_equal(state.avg_params, [1.0, np.nan])


@pytest.mark.parametrize("update", [None, 0.0, jnp.zeros(())])
@pytest.mark.parametrize("param", [2.0, 2, np.float32(2), True])
def test_skip_nonfinite_of_numbers(param, update):
    if update is not None and isinstance(param, bool):
        pytest.skip("a bool takes no update")
    tx = swa_jax.swa(skip_nonfinite=True)
    _, state = tx.update({"w": update}, tx.init({"w": param}), {"w": param})
    assert int(state.num_averaged) == 1
    assert state.avg_params["w"] == param
    if isinstance(param, float):
        _, state = tx.update({"w": update}, state, {"w": float("nan")})
        assert int(state.num_averaged) == 1


@pytest.mark.parametrize("tree", [{}, {"n": np.int32(3)}])
def test_skip_nonfinite_without_floating_leaves(tree):
    tx = swa_jax.swa(skip_nonfinite=True)
    assert int(follow(tx.init(tree), tx, [tree])[-1].num_averaged) == 1


# The transformation.


def test_signature_is_the_contract():
    assert str(inspect.signature(swa_jax.swa)).startswith(
        "(start_step: int = 0, period: int = 1, *, stop_step: int | None = None, "
        "accumulator_dtype: "
    )
    tx = swa_jax.swa()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert list(inspect.signature(tx.update).parameters) == [
        "updates",
        "state",
        "params",
        "extra_args",
    ]


def test_updates_pass_through_as_the_very_same_objects():
    tx = swa_jax.swa(2)
    params = {"w": jnp.ones(3), "b": {"c": jnp.ones(())}}
    updates = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    for _ in range(3):
        out, state = tx.update(updates, state, params, value=1.0, key=None)
        assert out is updates


@pytest.mark.parametrize("jit", [False, True])
def test_update_is_pure(jit):
    tx = swa_jax.swa()
    update = jax.jit(tx.update) if jit else tx.update
    params = {"w": np.array([1.0, 2.0], np.float32), "n": np.array([3])}
    updates = {"w": np.array([0.5, 0.25], np.float32), "n": np.array([1])}
    state = tx.update(updates, tx.init(params), params)[1]
    arguments = (updates, state, params)
    before = bits(arguments)
    first, second = update(*arguments), update(*arguments)
    assert bits(arguments) == before
    assert bits(first) == bits(second)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_update_average_and_swa_are_the_same_mean():
    models = np.random.default_rng(0).normal(size=(7, 30)).astype(np.float32)
    tx = swa_jax.swa()
    inside = follow(tx.init(models[0]), tx, models)[-1]
    outside = swa_jax.init_average(models[0])
    for model in models:
        outside = swa_jax.update_average(outside, model)
    # Not bit for bit: compiled alone, XLA may fuse other operations.
    np.testing.assert_allclose(
        inside.avg_params, outside.avg_params, rtol=0, atol=4 * U * np.abs(models).max()
    )
    assert bits(inside[:2]) == bits(outside[:2])


NUMPY = {"w": np.ones((4, 2), np.float32), "s": 1.0, "n": 3}


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("leaves", ["jax", "numpy", "elsewhere"])
def test_no_implicit_transfers(leaves, compensated):
    """Where JAX is told to refuse them, eager calls move what they must explicitly."""
    params, updates = NUMPY, jax.tree.map(np.zeros_like, NUMPY)
    if leaves != "numpy":
        place = jax.devices()[1] if leaves == "elsewhere" else None
        params, updates = jax.device_put((params, updates), place)
    tx = swa_jax.swa(2, 3, stop_step=9, skip_nonfinite=True, compensated=compensated)
    with jax.transfer_guard("disallow"):
        state = swa_jax.init_average(params, compensated=compensated)
        for sample in (None, True, np.bool_(False)):
            state = swa_jax.update_average(state, params, sample=sample)
        kept = swa_jax.averaged_with(state, params, skip_nonfinite=True)
        opt_state = tx.init(params)
        for _ in range(5):
            _, opt_state = tx.update(updates, opt_state, params)
    assert int(kept.num_averaged) == 3
    assert int(opt_state.num_averaged) == 2
    chex.assert_trees_all_equal(jax.device_get(kept.avg_params), jax.device_get(params))
    with pytest.raises(Exception, match="Disallowed"), jax.transfer_guard("disallow"):
        jnp.ones(2) + 1  # the guard is where we look for it


def test_no_implicit_transfers_with_shapes():
    with jax.transfer_guard("disallow"):
        state = swa_jax.swa().init({"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)})
    np.testing.assert_array_equal(state.avg_params["w"], [0.0, 0.0])


@pytest.mark.usefixtures("enable_x64")
def test_counters_stay_int32_with_x64():
    # The signature promises `int` alone; NumPy's are taken all the same.
    tx = swa_jax.swa(np.int64(2), stop_step=5)  # type: ignore[arg-type]
    params = jnp.ones(2, jnp.float64)
    state = follow(tx.init(params), tx, [np.ones(2)] * 3)[-1]
    assert state.num_updates.dtype == state.num_averaged.dtype == jnp.int32
    assert state.avg_params.dtype == jnp.float64


def test_differentiable_through_training():
    # w_t = (1 - lr)^t w_0 under SGD on w^2 / 2, so the mean over t = 2, 3, 4 and its
    # derivatives in w_0 and lr are polynomials.
    def mean(w, lr):
        tx = optax.chain(optax.sgd(lr), swa_jax.swa(start_step=2))
        state = tx.init(w)
        for _ in range(4):
            updates, state = tx.update(w, state, w)
            w = optax.apply_updates(w, updates)
        return swa_jax.swa_params(state, w)

    w, lr = 3.0, 0.25
    grads = jax.jit(jax.grad(mean, argnums=(0, 1)))(jnp.float32(w), jnp.float32(lr))
    expected = (
        sum((1 - lr) ** t for t in (2, 3, 4)) / 3,
        sum(-t * (1 - lr) ** (t - 1) * w for t in (2, 3, 4)) / 3,
    )
    # A dozen float32 operations on numbers of one size.
    np.testing.assert_allclose(grads, expected, rtol=16 * U)


# Bad input to swa().

STEP = r"at least {}, got {};"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start_step": -1}, ValueError, "start_step must be " + STEP.format(0, -1)),
        ({"period": 0}, ValueError, "period must be " + STEP.format(1, 0)),
        ({"period": -2}, ValueError, "period must be " + STEP.format(1, -2)),
        ({"stop_step": -1}, ValueError, "stop_step must be " + STEP.format(0, -1)),
        ({"start_step": 2**31}, ValueError, "start_step .*got 2147483648"),
        ({"period": 2**40}, ValueError, "period .*int32.*got 1099511627776"),
        (
            {"start_step": 5, "stop_step": 4},
            ValueError,
            "stop_step=4 is before start_step=5.*must be >= start_step, or None",
        ),
        ({"start_step": 1.5}, TypeError, "start_step must be an integer, got 1.5 of"),
        ({"period": 2.0}, TypeError, "period must be an integer, got 2.0 of type floa"),
        ({"stop_step": "9"}, TypeError, "stop_step must be an integer, got '9' of typ"),
        ({"start_step": None}, TypeError, "start_step must be an integer, got None"),
        ({"accumulator_dtype": jnp.int32}, TypeError, "accumulator_dtype must be a fl"),
        ({"accumulator_dtype": "f8"}, ValueError, "accumulator_dtype=float64 needs"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        swa_jax.swa(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start_step": jnp.int32(-1)}, ValueError, "start_step must be .*got -1"),
        ({"period": jnp.int32(0)}, ValueError, "period must be .*got 0"),
        (
            {"start_step": jnp.int32(5), "stop_step": 4},
            ValueError,
            "stop_step=4 is before start_step=5",
        ),
        ({"start_step": jnp.float32(1.5)}, TypeError, "start_step must be an integer"),
    ],
)
def test_refused_arguments_that_are_jax_arrays(arguments, error, message):
    # Known values are checked; only tracers cannot be.
    with pytest.raises(error, match=message):
        swa_jax.swa(**arguments)


# Bad input to update.

PARAMS = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(4)}}


@pytest.mark.parametrize("jit", [False, True])
def test_update_needs_params(jit):
    tx = optax.chain(optax.sgd(0.1), swa_jax.swa())
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(
        ValueError,
        match=r"swa: update received params=None.*tx.update\(updates, opt_state, para",
    ):
        update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("jit", [False, True])
def test_update_needs_a_state_of_its_own(jit):
    tx = swa_jax.swa()
    update = jax.jit(tx.update) if jit else tx.update
    # The last two arguments swapped, and the state of the whole chain.
    for state in (PARAMS, optax.chain(tx).init(PARAMS)):
        with pytest.raises(TypeError, match="swa: state must be an SWAState, got "):
            update(PARAMS, state, PARAMS)


def test_update_refuses_a_donated_state():
    tx = swa_jax.swa()
    state = tx.init(PARAMS)
    jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS)
    with pytest.raises(RuntimeError, match=r"swa: state has been donated.*go on with"):
        tx.update(PARAMS, state, PARAMS)


plain = swa_jax.swa()
donating_update = jax.jit(plain.update, donate_argnums=1)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": PARAMS["a"]}, r"only in the state's average: \['b'\]\['c'\]"),
        ({**PARAMS, "d": jnp.ones(())}, r"only in params: \['d'\]"),
        ({**PARAMS, "a": jnp.ones((3, 2))}, r"\['a'\] .*\(3, 2\).*\(2, 3\)"),
        ({**PARAMS, "a": jnp.ones((1, 3))}, r"\['a'\] .*\(1, 3\).*\(2, 3\)"),
        (
            {**PARAMS, "a": jnp.ones((2, 3), jnp.int32)},
            r"\['a'\] has dtype int32.*float32",
        ),
        (
            {**PARAMS, "a": jnp.ones((2, 3), jnp.complex64)},
            r"\['a'\] has dtype complex64.*float32",
        ),
    ],
)
def test_update_refuses_another_model(params, message, donate):
    update = donating_update if donate else plain.update
    updates = jax.tree.map(jnp.zeros_like, params)
    state = plain.init(PARAMS)
    with pytest.raises(
        ValueError, match=rf"(?s)swa: params.*{message}.*Fix: pass the par"
    ):
        update(updates, state, params)
    # Nothing is lost: the state was not donated and goes on.
    _, state = update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
    chex.assert_trees_all_equal(state.avg_params, PARAMS)


@pytest.mark.usefixtures("enable_x64")
@pytest.mark.parametrize(
    ("dtype", "other"), [(jnp.float64, jnp.float32), (jnp.float32, jnp.float64)]
)
def test_update_refuses_weights_with_another_accumulator(dtype, other):
    # The state says float64 means; the weights that come ask for float32, or back.
    tx = swa_jax.swa()
    with pytest.raises(
        ValueError, match=rf"has dtype {other.__name__}, but .*{dtype.__name__}"
    ):
        tx.update(jnp.zeros(2, other), tx.init(jnp.ones(2, dtype)), jnp.ones(2, other))


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 3), (3,), (1, 2, 3)])
def test_update_refuses_updates_that_would_broadcast(shape):
    tx = swa_jax.swa()
    state = tx.init(PARAMS)
    updates = {**PARAMS, "a": jnp.ones(shape)}
    with pytest.raises(
        ValueError, match=r"swa: updates\['a'\] has shape .*\(2, 3\).*Fix: "
    ):
        tx.update(updates, state, PARAMS)


@pytest.mark.parametrize(
    "updates",
    [{"a": PARAMS["a"]}, {**PARAMS, "d": PARAMS["a"]}, [PARAMS["a"], PARAMS["b"]]],
    ids=["missing", "surplus", "list"],
)
def test_update_refuses_updates_of_another_structure(updates):
    tx = swa_jax.swa()
    with pytest.raises(ValueError, match="swa: updates must have the structure of par"):
        tx.update(updates, tx.init(PARAMS), PARAMS)
